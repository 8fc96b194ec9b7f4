"""Placeholders for the attention packages, on the CPU: each function checks the call against the recorded signature and
answers by the definition of attention, in the shapes and with the conventions of the real one.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers import sage_calls  # noqa: F401  (registers its operators, which is possible once)
from diffusers_attn.providers.aten_kernels import Math
from diffusers_attn.providers.base import Params
from diffusers_attn.providers.catalog import SPECS

from .signatures import PARAMETERS, signature

Call = types.SimpleNamespace
"""the arguments of a call by the names that the package gives them."""


def params(scale: float, is_causal: bool) -> Params:
    return Params(MaskKind.NONE, is_causal, scale, False, 0.0, False, "cpu", ())


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None = None) -> tuple:
    """`[B, S, H, D]`; the lse is `[B, H, S]`."""
    k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
    out, lse = Math.forward(*(each.transpose(1, 2) for each in (q, k, v)), mask, params(scale, causal))
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def dense_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, mask: Tensor | None = None) -> tuple:  # fmt: skip  # noqa: E501
    groups, kv_heads = q.shape[2] // k.shape[2], k.shape[2]
    k, v = (each.repeat_interleave(groups, dim=2) for each in (k, v))
    grad, q, k, v, out = (each.transpose(1, 2) for each in (grad, q, k, v, out))
    grads = Math.backward(grad, q, k, v, mask, out, lse.transpose(1, 2), params(scale, causal))
    dq, dk, dv = (each.transpose(1, 2) for each in grads)
    return dq, *(each.unflatten(2, (kv_heads, groups)).sum(dim=3) for each in (dk, dv))


def sequences(call: Call) -> Any:
    """The places of each sequence in the packed query and key."""
    for place in range(len(call.cu_seqlens_q) - 1):
        q, k = call.cu_seqlens_q[place : place + 2].tolist(), call.cu_seqlens_k[place : place + 2].tolist()
        assert q[1] - q[0] <= call.max_seqlen_q
        assert k[1] - k[0] <= call.max_seqlen_k
        yield slice(*q), slice(*k)


def packed(call: Call, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`[total, H, D]`; the lse is `[H, total]`, +inf where a sequence has no key."""
    assert call.cu_seqlens_q.dtype == call.cu_seqlens_k.dtype == torch.int32
    out, lse = torch.full_like(call.q, math.nan), call.q.new_full(call.q.shape[1::-1], math.nan)
    for q, k in sequences(call):
        part, part_lse = dense(call.q[None, q], call.k[None, k], call.v[None, k], scale, causal)
        out[q], lse[:, q] = part[0], part_lse[0]
    return out, lse.masked_fill(lse == -math.inf, math.inf)


def packed_backward(call: Call, causal: bool) -> None:
    """Writes into the gradients that were given, in the places of the sequences only."""
    assert not (call.softmax_lse == -math.inf).any()
    for grad in (call.dq, call.dk, call.dv):
        grad.fill_(math.nan)
    for q, k in sequences(call):
        tensors = (call.dout[None, q], call.q[None, q], call.k[None, k], call.v[None, k], call.out[None, q])
        parts = dense_backward(*tensors, call.softmax_lse[None, :, q], call.softmax_scale, causal)
        for grad, part, place in zip((call.dq, call.dk, call.dv), parts, (q, k, k)):
            grad[place] = part[0]


def check_constants(call: Call) -> None:
    assert getattr(call, "dropout_p", 0.0) == 0.0
    assert getattr(call, "softcap", 0.0) in (0.0, None)
    assert getattr(call, "window_size", (-1, -1)) == (-1, -1)
    assert getattr(call, "window_size_left", -1) in (-1, None)
    assert getattr(call, "alibi_slopes", None) is None


def flash_2(package: str) -> dict[str, Callable[[Call], Any]]:
    def results(out: Tensor, lse: Tensor, call: Call) -> tuple:
        check_constants(call)
        # Up to 2.6 it returned its inputs, padded, in between.
        if package == "flash-attn 2.6.3":
            return out, call.q, call.k, call.v, out, lse, None, None
        return out, lse, None, None

    def backward(call: Call) -> None:
        check_constants(call)
        assert call.deterministic is True
        grads = dense_backward(
            call.dout, call.q, call.k, call.v, call.out, call.softmax_lse, call.softmax_scale, call.causal
        )
        for ours, grad in zip((call.dq, call.dk, call.dv), grads):
            ours.copy_(grad)

    return {
        "_flash_attn_forward": lambda call: results(
            *dense(call.q, call.k, call.v, call.softmax_scale, call.causal), call
        ),
        "_flash_attn_varlen_forward": lambda call: results(*packed(call, call.softmax_scale, call.causal), call),
        "_flash_attn_backward": backward,
        "_flash_attn_varlen_backward": lambda call: packed_backward(call, call.causal),
    }


def flash_3_forward(call: Call) -> tuple:
    check_constants(call)
    if call.q.dtype == torch.float8_e4m3fn:
        call = dequantized(call)
    else:
        assert call.q_descale is call.k_descale is call.v_descale is None
    if call.cu_seqlens_q is not None:
        return *packed(call, call.softmax_scale, call.causal), None, None
    return *dense(call.q, call.k, call.v, call.softmax_scale, call.causal), None, None


def dequantized(call: Call) -> Call:
    """The call in float64. (The real operator's output is bfloat16: one rounding more.)"""
    assert call.q.dtype == call.k.dtype == call.v.dtype == torch.float8_e4m3fn
    assert call.q.shape[-1] % 16 == 0
    batch = call.q.shape[0] if call.cu_seqlens_q is None else len(call.cu_seqlens_q) - 1
    tensors = {}
    for name, starts in (("q", call.cu_seqlens_q), ("k", call.cu_seqlens_k), ("v", call.cu_seqlens_k)):
        tensor, factor = getattr(call, name), getattr(call, f"{name}_descale")
        assert factor.dtype == torch.float32 and factor.shape == (batch, call.k.shape[-2])
        factor = factor.double().repeat_interleave(tensor.shape[-2] // factor.shape[1], dim=1)  # [batch, heads]
        if starts is None:
            factor = factor[:, None]
        else:  # behind the last sequence there are dropped keys, which nothing reads
            sample = torch.bucketize(torch.arange(len(tensor)), starts[1:], right=True).clamp(max=batch - 1)
            factor = factor[sample]
        tensors[name] = tensor.double() * factor.unsqueeze(-1)
    return Call(**{**vars(call), **tensors})


def flash_3_backward(call: Call) -> None:
    if call.cu_seqlens_q is not None:
        packed_backward(call, call.is_causal)
        return
    flash_2("flash-attn 2.8.3")["_flash_attn_backward"](Call(**{**vars(call), "causal": call.is_causal}))


def flash_4_mask(call: Call) -> Tensor | None:
    if call.seqused_k is not None:
        assert call.seqused_k.dtype == torch.int32
        return torch.arange(call.k.shape[1]) < call.seqused_k.view(-1, 1, 1, 1)
    if call.mask_mod is None:
        return None
    (entries,) = call.aux_tensors
    assert entries.dtype == torch.uint8
    assert entries.shape == (call.q.shape[0], call.q.shape[2], call.q.shape[1], call.k.shape[1])
    return entries.bool()


def flash_4_forward(call: Call) -> tuple:
    check_constants(call)
    assert call.return_lse
    return *dense(call.q, call.k, call.v, call.softmax_scale, call.causal, flash_4_mask(call)), None, None, None


def flash_4_backward(call: Call) -> tuple:
    check_constants(call)
    assert call.deterministic is True
    assert call.lse.is_contiguous()
    mask = flash_4_mask(call)
    grads = dense_backward(call.dout, call.q, call.k, call.v, call.out, call.lse, call.softmax_scale, call.causal, mask)
    for ours, grad in zip((call.dq, call.dk, call.dv), grads):
        ours.copy_(grad)
    if call.seqused_k is not None:  # places past the lengths are not written
        unused = ~mask.view(-1, call.k.shape[1], 1, 1)
        call.dk.masked_fill_(unused, math.nan)
        call.dv.masked_fill_(unused, math.nan)
    return call.dq, call.dk, call.dv


def sage(call: Call) -> Any:
    assert call.tensor_layout == "NHD"
    out, lse = dense(call.q, call.k, call.v, call.sm_scale, call.is_causal, getattr(call, "attn_mask", None))
    return (out, lse) if call.return_lse else out


def sage_3(call: Call) -> Tensor:
    assert call.attn_mask is None and call.per_block_mean is None and call.q.shape[-1] in (64, 128)
    assert call.q.shape[1] == call.k.shape[1] == call.v.shape[1]
    assert call.q.is_contiguous() and call.k.is_contiguous() and call.v.is_contiguous()
    call.k -= call.k.mean(dim=-2, keepdim=True)
    tensors = (each.transpose(1, 2) for each in (call.q, call.k, call.v))
    return dense(*tensors, call.q.shape[-1] ** -0.5, call.is_causal)[0].transpose(1, 2).contiguous()


def xformers_forward(call: Call) -> tuple:
    causal = type(call.attn_bias).__name__ == "LowerTriangularMask"
    out, lse = dense(call.query, call.key, call.value, call.scale, causal, xformers_bias(call))
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)


def xformers_backward(call: Call) -> tuple:
    causal = type(call.attn_bias).__name__ == "LowerTriangularMask"
    tensors = call.grad, call.query, call.key, call.value, call.output, call.lse
    return dense_backward(*tensors, call.scale, causal, xformers_bias(call))


def xformers_bias(call: Call) -> Tensor | None:
    if not isinstance(call.attn_bias, Tensor):
        return None
    shape = call.query.shape[0], call.query.shape[2], call.query.shape[1], call.key.shape[1]
    assert call.attn_bias.shape == shape
    assert call.attn_bias.stride(-1) == 1
    assert all(stride % 8 == 0 for size, stride in zip(shape[:-1], call.attn_bias.stride()) if size > 1)
    assert not (call.attn_bias == -math.inf).all(dim=-1).any()
    return call.attn_bias


FUNCTIONS: dict[str, dict[str, Callable[[Call], Any]]] = {
    **{package: flash_2(package) for package in PARAMETERS if package.startswith("flash-attn 2")},
    "flash-attn-3 3.0.0": {"_flash_attn_forward": flash_3_forward, "_flash_attn_backward": flash_3_backward},
    "flash-attn-4 4.0.0b36": {"_flash_attn_fwd": flash_4_forward, "_flash_attn_bwd": flash_4_backward},
    "sageattention 2.2.0": {
        name: sage if name != "sageattn_varlen" else lambda call: packed(call, call.sm_scale, call.is_causal)[0]
        for name in PARAMETERS["sageattention 2.2.0"]
    },
    "sageattn3 1.0.0": {"sageattn3_blackwell": sage_3},
    "xformers 0.0.35": {
        "memory_efficient_attention_forward_requires_grad": xformers_forward,
        "memory_efficient_attention_backward": xformers_backward,
    },
}


def placeholder(package: str, function: str) -> Callable[..., Any]:
    """The placeholder of one function of a package."""
    bound, answer = signature(package, function), FUNCTIONS[package][function]

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = bound.bind(*args, **kwargs)
        arguments.apply_defaults()
        return answer(Call(**arguments.arguments))

    call.__signature__ = bound  # type: ignore[attr-defined]
    return call


MODULES = {
    "flash-attn": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute.interface",
    "sageattention": "sageattention.core",
    "sageattn3": "sageattn3",
    "xformers": "xformers.ops.fmha",
}
"""The module of each package that has the functions."""


def install(package: str, adapter: str, monkeypatch: Any) -> types.SimpleNamespace:
    """Placeholders for `package` in `sys.modules`.

    Returns:
        `kernel`, the adapter over these placeholders; `module`, the adapter's module; and `package`, the placeholder of
        the package's module with the functions.
    """
    functions = {name: placeholder(package, name) for name in FUNCTIONS[package]}
    kind = package.split()[0]
    source = MODULES[kind]
    modules: dict[str, dict[str, Any]] = {}
    if kind == "flash-attn-4":
        modules |= {"cutlass": {}, "cutlass.cute": {"jit": lambda function: function}}
    parts = source.split(".")
    modules |= {".".join(parts[: end + 1]): {} for end in range(len(parts))}
    modules[source] = functions
    if kind == "flash-attn-4":
        modules["flash_attn.cute.utils"] = {}
    if kind == "xformers":
        functions["attn_bias"] = types.SimpleNamespace(LowerTriangularMask=type("LowerTriangularMask", (), {}))
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    (file,) = {spec.adapter.partition(":")[0] for spec in SPECS.values() if spec.adapter.endswith(f":{adapter}")}
    name = f"diffusers_attn.providers.{file}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.library, "custom_op", unregistered)
        module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # flash4 compares it with the tensor's
    kernel = getattr(module, adapter).over(sys.modules[source], "package")
    return types.SimpleNamespace(kernel=kernel, module=module, package=sys.modules[source])


def unregistered(name: str, function: Any = None, **kwargs: Any) -> Any:
    """`torch.library.custom_op` that registers nothing: a name can be registered once per process only."""

    def wrap(function: Any) -> Any:
        function.register_fake = lambda fake: fake
        return function

    return wrap if function is None else wrap(function)
