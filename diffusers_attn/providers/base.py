"""What a provider is: a statement of what it can do, and an adapter that does it.

Statements are data (`catalog.py`), so that a decision can be made, a table printed and an error written without
importing a single kernel package. An adapter is a thin class over one package, imported when first asked for. It has
two pure functions, forward with the log-sum-exp and backward from it, because that pair is all that partial attention
over several devices needs; `KernelFunction` makes any such pair differentiable.

Shapes: query `[batch, query_len, heads, head_dim]`, key and value `[batch, key_len, kv_heads, head_dim]`, or with heads
before lengths where an adapter's `layout` says "bhsd". The lse is float32 (float64 for float64 inputs), natural
logarithm of the sum of the exponentials of the true scaled scores, always `[batch, query_len, heads]`; -inf where a row
has no key.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ..errors import AttentionProviderError
from ..masks import MaskKind
from ..shapes import Layout
from ..tracing.functions import result


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword of a kernel that a user may set: `DispatchProcessor("flash", deterministic=True)`."""

    type: type | tuple[type, ...]
    doc: str
    choices: tuple[object, ...] | None = None
    by_place: bool = False
    """whether what it does depends on places in the sequence, so that it needs the whole of it, in order."""
    off: object = None
    """the value with which it does nothing."""

    def check(self, provider: str, name: str, value: object) -> None:
        """Raises AttentionProviderError where `value` is not one that the kernel takes."""
        # bool is an int to isinstance; a flag given where a number belongs is a mistake.
        wrong_type = not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool)
        if wrong_type or (self.choices is not None and value not in self.choices):
            kinds = self.type if isinstance(self.type, tuple) else (self.type,)
            accepted = self.choices or " or ".join(kind.__name__ for kind in kinds)
            raise AttentionProviderError(
                f"option {name}={value!r} of provider '{provider}': accepted is {accepted} ({self.doc})."
            )


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The package that a provider needs, and how a user gets it."""

    distribution: str
    """name on the package index, as `importlib.metadata` knows it."""
    minimum: str
    module: str
    """what is imported."""
    install: str
    """the command that installs it."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a provider computes exactly (or, if not `exact`, as accurately as it ever does).

    Dispatch decides from this alone, before anything runs.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    masks: frozenset[MaskKind] = frozenset({MaskKind.NONE})
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    """the kernel's own granularity; other sizes are padded with zeros, which changes nothing."""
    value_head_dim: bool = False
    """whether the value's head_dim may differ from the query's."""
    causal: Literal["none", "square", "top_left"] = "none"
    """`square`: only for equal lengths (dispatch splits the others); `top_left`: any lengths, PyTorch's alignment."""
    gqa: bool = False
    """fewer key than query heads without repeating them."""
    dropout: bool = False
    lse: bool = True
    backward: bool = True
    backward_of_parts: bool = True
    """whether `Adapter.backward` exists, which attention over several devices needs; else only autograd has it."""
    bias_gradient: bool = False
    every_derivative: bool = False
    """whether it is made of PyTorch's operators alone: transforms of torch.func and forward-mode differentiation go
    through it as far as they go through those."""
    cuda_graph: bool = True
    min_compute_capability: tuple[int, int] | None = None
    compute_capabilities: frozenset[tuple[int, int]] | None = None
    """the only ones the kernel is built for, where a minimum would promise too much."""
    exact: bool = True
    without_backward_on: frozenset[str] = frozenset()
    """device types on which there is no backward although there is one elsewhere."""


@dataclasses.dataclass(frozen=True)
class ProviderSpec:
    """One row of the catalog."""

    name: str
    adapter: str
    """`module:class` below this package, imported when first used."""
    capabilities: Capabilities
    summary: str
    requirement: Requirement | None = None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)


class Params(NamedTuple):
    """The constants of one call, in the kernel's terms. No tensors: the compiler treats all of it as constant."""

    mask_kind: MaskKind
    is_causal: bool
    scale: float
    default_scale: bool
    """whether `scale` is the kernel's own default, `head_dim ** -0.5`."""
    dropout_p: float
    gqa: bool
    """whether key and value have fewer heads than the query."""
    device_type: str
    options: tuple[tuple[str, Any], ...]
    needs_grad: bool = True
    """whether a gradient of query, key or value may be wanted."""
    derived: bool = False
    """whether the call is within a transform of torch.func, or differentiated in forward mode."""


class Adapter:
    """Calls one kernel. Never instantiated and without state: whatever it cannot do, its spec says so."""

    layout: ClassVar[Layout] = "bshd"
    """which order of dimensions the kernel takes; dispatch hands it over by view."""

    @classmethod
    def check_device(cls, device: torch.device) -> str | None:
        """Why the installed kernel cannot run on `device`, beyond what the spec says; None where it can."""
        return None

    @classmethod
    def bind(cls, params: Params) -> Callable[..., torch.Tensor]:
        """`attention` with its constants bound: `(query, key, value, mask=None) -> out`. Made once per kind of call."""
        return functools.partial(cls.attention, params=params)

    @classmethod
    def attention(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, *, params: Params
    ) -> torch.Tensor:
        """Differentiable attention; the result has the adapter's layout."""
        if torch.compiler.is_compiling() and (query is key or key is value):
            # Dynamo takes no tensor twice as the input of an autograd.Function.
            key, value = key.view_as(key), value.view_as(value)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return KernelFunction.apply(cls, query, key, value, mask, params)[0]
        return cls.forward(query, key, value, mask, params)[0]

    @classmethod
    def forward(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, params: Params
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse, without autograd."""
        raise NotImplementedError

    @classmethod
    def backward(
        cls,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        out: torch.Tensor,
        lse: torch.Tensor,
        params: Params,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value.

        `out` and `lse` may come from more keys than `key` holds: with those of the whole sequence, the gradients are
        this part's share of the whole.
        """
        raise NotImplementedError


class KernelFunction(torch.autograd.Function):
    """Makes an adapter's forward and backward differentiable. Returns the output and the lse, which carries none."""

    @staticmethod
    def forward(ctx, adapter, query, key, value, mask, params):  # type: ignore[no-untyped-def]
        out, lse = adapter.forward(query, key, value, mask, params)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.adapter, ctx.params = adapter, params
        ctx.mark_non_differentiable(lse)
        return result(out), lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
        query, key, value, mask, out, lse = ctx.saved_tensors
        grads = ctx.adapter.backward(grad_out, query, key, value, mask, out, lse, ctx.params)
        return None, *grads, None, None
