"""The interface of a provider: its capabilities as data, and an adapter that calls its kernel.

Capabilities are data (`catalog.py`), so that a decision, a table or an error needs no kernel package. An adapter is a
thin class over one package and is imported on first use. It has two pure functions: a forward that returns the
log-sum-exp, and a backward that takes it. Partial attention over several ranks needs only these two, and
`KernelFunction` makes them differentiable.

Shapes: query `[batch, query_len, heads, head_dim]`, key and value `[batch, key_len, kv_heads, head_dim]`, or with heads
before lengths if the adapter's `layout` is "bhsd". The lse is the natural logarithm of the sum of the exponentials of
the scaled scores. It is float32 (float64 for float64 inputs), always `[batch, query_len, heads]`, and -inf in a row
without keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ..errors import AttentionProviderError
from ..masks import MaskKind
from ..shapes import Layout
from ..tracing.functions import result


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword of a kernel that users may set, as in `DispatchProcessor("flash", deterministic=True)`."""

    type: type | tuple[type, ...]
    doc: str
    choices: tuple[object, ...] | None = None
    by_place: bool = False
    """Whether its effect depends on positions in the sequence, so that the kernel needs the full sequence, in order."""
    off: object = None
    """The value that turns the option off."""

    def check(self, provider: str, name: str, value: object) -> None:
        """Raises AttentionProviderError if the kernel does not accept `value`."""
        # To isinstance a bool is an int, but True for a number is a mistake.
        wrong_type = not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool)
        if wrong_type or (self.choices is not None and value not in self.choices):
            kinds = self.type if isinstance(self.type, tuple) else (self.type,)
            accepted = self.choices or " or ".join(kind.__name__ for kind in kinds)
            raise AttentionProviderError(
                f"option {name}={value!r} of provider '{provider}': accepted is {accepted} ({self.doc})."
            )


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The package that a provider needs, and the command that installs it."""

    distribution: str
    """Name on the package index, as `importlib.metadata` uses it."""
    minimum: str
    module: str
    """Name of the module to import."""
    install: str
    """The command that installs it."""


@dataclasses.dataclass(frozen=True)
class HubKernel:
    """A kernel on the Hugging Face Hub, compiled for each PyTorch and CUDA. The package `kernels` downloads it."""

    repo: str
    """Repository of the kernel, such as `kernels-community/flash-attn2`."""
    version: int
    """Version of the kernel's interface. Builds for newer versions of PyTorch are added to it."""
    module: str = ""
    """Submodule of the kernel that has the functions of the package's module; empty for the kernel itself."""

    def __str__(self) -> str:
        return f"{self.repo} (version {self.version})"


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a provider can compute. Dispatch decides from this alone, before anything runs."""

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    masks: frozenset[MaskKind] = frozenset({MaskKind.NONE})
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    """Multiple that the kernel needs; other sizes are padded with zeros, which does not change the result."""
    value_head_dim: bool = False
    """Whether the head_dim of the value may differ from that of the query."""
    causal: Literal["none", "square", "top_left"] = "none"
    """`square`: equal lengths only (dispatch splits other calls); `top_left`: any lengths, with PyTorch's alignment."""
    gqa: bool = False
    """Whether the kernel takes fewer key heads than query heads."""
    dropout: bool = False
    lse: bool = True
    backward: bool = True
    backward_of_parts: bool = True
    """Whether `Adapter.backward` exists, which a ring needs; otherwise only autograd computes gradients."""
    bias_gradient: bool = False
    every_derivative: bool = False
    """Whether it consists of PyTorch's operators, so that transforms of torch.func and forward-mode differentiation
    work as they do for those operators."""
    cuda_graph: bool = True
    min_compute_capability: tuple[int, int] | None = None
    compute_capabilities: frozenset[tuple[int, int]] | None = None
    """The only compute capabilities that the kernel is built for; None if a minimum describes them."""
    exact: bool = True
    without_backward_on: frozenset[str] = frozenset()
    """Device types without a backward, for a provider that has one elsewhere."""


@dataclasses.dataclass(frozen=True)
class ProviderSpec:
    """One row of the catalog."""

    name: str
    adapter: str
    """`module:class` in this folder, imported on first use."""
    capabilities: Capabilities
    summary: str
    requirement: Requirement | None = None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    hub: HubKernel | None = None
    """The kernel on the Hub that can replace the package; None without one."""
    without_hub: str = "the Hub has no build of it"
    """Why `hub` is None."""


class Params(NamedTuple):
    """The constants of one call for a kernel. Contains no tensors: compilers treat all of it as constant."""

    mask_kind: MaskKind
    is_causal: bool
    scale: float
    default_scale: bool
    """Whether `scale` is the default of the kernel, `head_dim ** -0.5`."""
    dropout_p: float
    gqa: bool
    """Whether key and value have fewer heads than the query."""
    device_type: str
    options: tuple[tuple[str, Any], ...]
    needs_grad: bool = True
    """Whether a gradient may be computed."""
    derived: bool = False
    """Whether the call is inside a transform of torch.func or differentiated in forward mode."""


class Adapter:
    """Calls one kernel. It is never instantiated and has no state. Its spec lists what it can compute.

    An adapter of a package that the Hub has too is a template: `over` makes the class that calls the functions of one
    of the two.
    """

    layout: ClassVar[Layout] = "bshd"
    """The layout that the kernel takes; dispatch transposes by view."""

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        """This adapter with the functions of `package`. Called once per source.

        Args:
            package: the module that the spec's requirement names, or that of the kernel from the Hub; None for
                PyTorch's own kernels.
            source: "package" or "hub".

        Raises:
            Exception: the package has no such functions.
        """
        return cls

    @classmethod
    def check_device(cls, device: torch.device) -> str | None:
        """Why the installed kernel cannot run on `device`, in addition to its spec; None if it can."""
        return None

    @classmethod
    def bind(cls, params: Params) -> Callable[..., torch.Tensor]:
        """`attention` with bound constants: `(query, key, value, mask=None) -> out`. Called once per kind of call."""
        return functools.partial(cls.attention, params=params)

    @classmethod
    def attention(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, *, params: Params
    ) -> torch.Tensor:
        """Differentiable attention; the result has the adapter's layout."""
        if torch.compiler.is_compiling() and (query is key or key is value):
            # Dynamo does not accept one tensor twice as an input of an autograd.Function.
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

        `out` and `lse` may come from more keys than `key` holds. With those of the full sequence, the results are the
        share of these keys in the gradients.
        """
        raise NotImplementedError


class KernelFunction(torch.autograd.Function):
    """Makes the forward and backward of an adapter differentiable. Returns the output and the lse; the lse has no
    gradient."""

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
