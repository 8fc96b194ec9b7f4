"""Runs a cell on one device and names its outcome."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.masks import MaskKind

from .. import reference
from . import tolerances
from .features import FEATURES, MASKS, Feature
from .forms import FORMS, Attend
from .statements import NONE, dtype_of, refusals

REFUSED, FAULT = "refused: ", "fault: "
Outcome = dict[str, float] | str
"""Relative errors, "out" of the output and "grad" of the worst gradient; or "refused: ..." with the message; or
"fault: ..."."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of attention: tensors of one process, and arguments."""

    provider: str
    feature: Feature
    inputs: tuple[Tensor, ...]
    """query, key, value, and a mask whose gradient is computed."""
    mask: Tensor | None
    """The mask by its values, also that of a `BlockMask`."""

    @staticmethod
    def of(provider: str, feature: Feature, device: torch.device, needs_grad: bool) -> Call:
        dtype = dtype_of(provider, feature, device.type)
        inputs = feature.tensors(device, dtype)
        mask = MASKS[feature.mask].make(feature, device, dtype) if feature.mask else None
        if feature.mask and MASKS[feature.mask].needs_grad:
            inputs = (*inputs, mask)
        return Call(provider, feature, tuple(each.requires_grad_(needs_grad) for each in inputs), mask)

    def compute(self, *inputs: Tensor, mask: Any = None, attend: Attend = attention_dispatch) -> Tensor:
        """Attention to `inputs`, which stand for the call's."""
        rest = self.feature.arguments()
        if len(inputs) == 4 or mask is not None:
            rest["attn_mask"] = inputs[3] if len(inputs) == 4 else mask
        return FORMS[self.feature.form].call(attend, *inputs[:3], **rest)

    def given_mask(self) -> Any:
        """The mask as it is passed."""
        make = FORMS[self.feature.form].mask
        if make is not None:
            return make(self.feature.query_len, self.feature.key_len)
        if self.feature.mask_kind != MaskKind.BLOCK:
            return self.mask
        assert self.mask is not None
        values, device = self.mask, self.mask.device
        lengths = self.feature.query_len, self.feature.key_len
        return create_block_mask(lambda b, h, query, key: values[0, 0, query, key], None, None, *lengths, device=device)

    def definition(self, out: Tensor) -> Tensor:
        """What the output should be, in float64. Where weights are dropped, `out` shows which."""
        inputs, feature = self.inputs, self.feature
        if dict(feature.options):
            return _with_options(*inputs, **dict(feature.options))
        rest: dict[str, Any] = {"is_causal": feature.is_causal, "scale": feature.scale}
        mask = inputs[3] if len(inputs) == 4 else self.mask
        given = (*inputs[:2], inputs[2].detach()) if feature.dropout_p else inputs[:3]
        expected = FORMS[feature.form].expected(*given, **(rest | ({} if mask is None else {"mask": mask})))
        if feature.dropout_p:
            kept = out.detach() != 0
            share = 1.0 - kept.double().mean().item()
            assert abs(share - feature.dropout_p) < 0.02, f"{share:.3f} of the weights are dropped"
            weights = expected.masked_fill(~kept, 0.0) / (1.0 - feature.dropout_p)
            return weights @ inputs[2].double()
        return expected

    def limits(self) -> dict[str, float]:
        """The tolerances of the output and of gradients."""
        dtype, device = self.inputs[0].dtype, self.inputs[0].device.type
        provider = self.provider
        return {"out": tolerances.output(provider, dtype, device), "grad": tolerances.gradient(dtype, device)}


def _with_options(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """A window of `(left, right)` keys around each query, or scores capped at `softcap`."""
    if "window_size" in options:
        left, right = options["window_size"]
        places = torch.arange(query.shape[2], device=query.device)
        distance = places.view(-1, 1) - places
        return reference.attention(query, key, value, (distance <= left) & (distance >= -right))[0]
    scores = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    return (options["softcap"] * torch.tanh(scores / options["softcap"])).softmax(dim=-1) @ value.double()


def outcome(provider: str, feature: str, name: str, device: torch.device) -> Outcome:
    """What a cell of strategy "none" ends with."""
    call = FEATURES[feature]
    served = not refusals(provider, NONE, call, name, device.type, needs_grad=True)
    needs_grad = name == "backward" or (name in ("compiled", "captured") and served and "backward" in _passes(call))
    return named(
        lambda: _errors(provider, call, name, device, needs_grad),
        refusals(provider, NONE, call, name, device.type, needs_grad),
        name == "captured",
    )


def _passes(feature: Feature) -> tuple[str, ...]:
    return FORMS[feature.form].passes


def named(
    compute: Callable[[], tuple[dict[str, float], dict[str, float]]], refused: list[str], captured: bool = False
) -> Outcome:
    """The outcome of a cell.

    Args:
        compute: returns the errors and their limits.
        refused: words of the errors that its provider's statements allow; empty if it must be served.
        captured: whether the pass captures a graph.
    """
    try:
        errors, limits = compute()
    except Exception as error:
        message = refusal_in(error)
        if not message:
            return f"{FAULT}{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        if not any(words in message for words in refused):
            return f"{FAULT}refused with another error than its statements say ({refused}): {message}"
        ran = _ran_before(compute, captured)
        return f"{FAULT}{', '.join(ran)} ran before: {message}" if ran else f"{REFUSED}{reason_of(message)}"
    if refused:
        return f"{FAULT}computed, although its statements say: {', '.join(refused)}"
    wrong = [f"{name} is off by {error:.2e}" for name, error in errors.items() if not error <= limits[name]]
    return f"{FAULT}{', '.join(wrong)}" if wrong else {name: float(f"{error:.1e}") for name, error in errors.items()}


def refusal_in(error: BaseException | None) -> str:
    """The message of the library's error, also where a compiler has wrapped it in one of its own; empty without."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, AttentionProviderError):
            return text
        quoted = re.search(rf"{AttentionProviderError.__name__}\((['\"])(.*?)\1\)", text)
        if quoted:
            return quoted[2]
        error = error.__cause__ or error.__context__
    return ""


def reason_of(message: str) -> str:
    """The part of a message that does not repeat the call and the providers that are here."""
    _, own, rest = message.partition("cannot serve this call: ")
    if own:
        return rest.partition(". The call: ")[0]
    return message.partition("call: ")[0].rstrip() if "usable here" in message else message.partition(". ")[0]


class _Ran(TorchDispatchMode):
    """Notes operators that compute attention or send something. In a capture, those that it would record: what ran
    before it are runs without a graph."""

    def __init__(self, captured: bool) -> None:
        super().__init__()
        self.captured = captured
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_graph = not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing() or not self.captured
        if in_graph and re.search(
            r"softmax|attention|flash|bmm|matmul|c10d|all_to_all|all_gather|sage|xformers", str(func)
        ):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def _ran_before(compute: Callable[[], Any], captured: bool) -> list[str]:
    """The operators that run although the cell is refused."""
    with _Ran(captured) as ran:
        try:
            compute()
        except Exception as error:
            assert refusal_in(error)
    return ran.names


def _errors(
    provider: str, feature: Feature, name: str, device: torch.device, needs_grad: bool
) -> tuple[dict[str, float], dict[str, float]]:
    call = Call.of(provider, feature, device, needs_grad)
    with attention_provider(provider, **dict(feature.options)):
        out, grad_out, grads = _RUN[name](call)
    return compare(call, out, grad_out, grads)


def compare(
    call: Call, out: Tensor, grad_out: Tensor | None, grads: tuple[Tensor, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """The errors of an output and of gradients, relative to the norms that they should have, and their limits."""
    inputs, limits = call.inputs, call.limits()
    expected = call.definition(out)
    assert out.shape == expected.shape, f"{list(out.shape)} instead of {list(expected.shape)}"
    assert out.dtype == inputs[0].dtype, f"{out.dtype}"
    if FORMS[call.feature.form].shapes_only:
        return {"out": 0.0}, limits
    errors = {"out": reference.relative_error(out, expected)}
    if grads:
        assert grad_out is not None
        wanted = torch.autograd.grad(expected, inputs, grad_out.double())
        errors["grad"] = max(_gradient_error(*pair, grad_out) for pair in zip(grads, wanted))
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}, limits


def _gradient_error(found: Tensor, wanted: Tensor, grad_out: Tensor) -> float:
    """Relative to the gradient; or to that of the output, where softmax over one key leaves none."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    scale = wanted.double().norm().item()
    floor = grad_out.double().norm().item()
    return (found.double() - wanted.double()).norm().item() / ((scale if scale > 1e-3 * floor else floor) or 1.0)


Computed = tuple[Tensor, Tensor | None, tuple[Tensor, ...]]
"""An output, the gradient that it was given, and the gradients of the inputs; None and () without."""


def _forward(call: Call) -> Computed:
    with torch.no_grad():
        return call.compute(*call.inputs, mask=call.given_mask()), None, ()


def _backward(call: Call) -> Computed:
    out = call.compute(*call.inputs, mask=call.given_mask())
    grad_out = gradient_like(out)
    return out.detach(), grad_out, torch.autograd.grad(out, call.inputs, grad_out)


def gradient_like(out: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randn(out.shape, generator=random, dtype=torch.float64).to(out)


def _compiled(call: Call) -> Computed:
    """By Inductor on a GPU. On a CPU as a graph of operators: what Inductor writes in C++ takes many times as long."""
    torch._dynamo.reset()
    backend = "inductor" if call.inputs[0].device.type == "cuda" else "aot_eager"
    mask = call.given_mask()
    graph = torch.compile(lambda *inputs, mask: call.compute(*inputs, mask=mask), backend=backend, fullgraph=True)

    def compute(*inputs: Tensor) -> Tensor:
        return graph(*inputs, mask=mask)

    return differentiated(compute, call.inputs)


def differentiated(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Computed:
    """The output, and gradients where inputs require them."""
    if not inputs[0].requires_grad:
        with torch.no_grad():
            return compute(*inputs), None, ()
    out = compute(*inputs)
    grad_out = gradient_like(out)
    return out.detach(), grad_out, torch.autograd.grad(out, inputs, grad_out)


def _captured(call: Call) -> Computed:
    """Recorded with inputs of zero, and replayed with the call's. Kernels that compile do so before."""
    mask = call.given_mask()
    held = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in call.inputs)
    shape = (call.feature.batch, call.feature.heads, call.feature.query_len, call.feature.value_head_dim)
    grad_out = gradient_like(torch.empty(shape, dtype=held[0].dtype, device=held[0].device))

    def compute() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(held[0].requires_grad):
            out = call.compute(*held, mask=mask)
        return out, torch.autograd.grad(out, held, grad_out) if held[0].requires_grad else ()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        for each in held:
            each.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = compute()
    with torch.no_grad():
        for each, real in zip(held, call.inputs):
            each.copy_(real)
    graph.replay()
    torch.cuda.synchronize()
    kept = out.detach().clone(), grad_out, tuple(each.clone() for each in grads)
    graph.reset()
    return kept


_RUN = {"forward": _forward, "backward": _backward, "compiled": _compiled, "captured": _captured}
