"""The properties of a call, and how a provider serves it or why it cannot, from the provider's capabilities alone.

A call is served as it is, or with exact lowerings (see `lowering.py`), or refused with a reason.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import shapes
from ..call import AttentionCall
from ..masks import ADDITIVE, MaskKind
from ..shapes import Layout
from ..tracing.symbolic import constant
from . import registry, speeds
from .base import Adapter, ProviderSpec
from .catalog import options_by_place
from .hub import PACKAGE, chosen_source


class CallProperties(NamedTuple):
    """The properties of a call that decisions depend on. It has no lengths, only the comparisons that decisions need,
    so that a compiled graph with dynamic lengths stays one graph."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    heads: int
    kv_heads: int
    query_len: str
    """Length of the query relative to the key: "equal", "shorter" or "longer"."""
    long: bool
    """Whether `auto` uses the measured speeds of long sequences."""
    mask_kind: MaskKind
    is_causal: bool
    dropout: bool
    needs_grad: bool
    bias_needs_grad: bool
    options: tuple[tuple[str, object], ...]
    partial: bool = False
    """Whether the call attends to a part of the keys, and its result merges with those of the other parts."""
    derived: bool = False
    """Whether the call is inside a transform of torch.func or differentiated in forward mode."""

    @staticmethod
    def of(
        call: AttentionCall, mask_kind: MaskKind, *, partial: bool = False, compare_lengths: bool = True
    ) -> CallProperties:
        """The properties of a call with four dimensions; also in a graph that is traced with symbolic sizes.

        A comparison of symbolic sizes becomes a guard of the graph. So lengths are compared only where the decision
        depends on them, and results are spelled out as True or False.

        Args:
            mask_kind: kind of the call's mask, by `masks.classify`.
            partial: whether the call attends to a part of the keys.
            compare_lengths: False describes the query as "equal" in length to the key.
        """
        query, key, value, heads, seq = call.query, call.key, call.value, call.heads_dim, call.seq_dim
        query_len = "equal"
        own_options = [name for name, _ in call.options if name != "source"]
        if compare_lengths and (call.is_causal or own_options) and query.shape[seq] != key.shape[seq]:
            query_len = "shorter" if query.shape[seq] < key.shape[seq] else "longer"
        sizes = [constant(tensor.shape[heads]) for tensor in (query, key, value)]
        all_heads = shapes.joint(*sizes)
        bias_needs_grad = False
        if mask_kind in ADDITIVE and call.mask is not None:
            bias_needs_grad = torch.is_grad_enabled() and call.mask.requires_grad
        return CallProperties(
            device=query.device,
            dtype=query.dtype,
            head_dim=constant(query.shape[-1]),
            value_head_dim=constant(value.shape[-1]),
            heads=all_heads,
            kv_heads=sizes[1] if sizes[1] == sizes[2] else all_heads,
            query_len=query_len,
            long=True if call.provider == "auto" and key.shape[seq] >= speeds.LONG else False,
            mask_kind=mask_kind,
            is_causal=call.is_causal,
            dropout=True if call.dropout_p > 0.0 else False,
            needs_grad=call.needs_grad,
            bias_needs_grad=bias_needs_grad,
            options=call.options,
            partial=partial,
            derived=call.derived,
        )

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads} query and {self.kv_heads} key"
        parts = [f"{str(self.dtype).removeprefix('torch.')} on {self.device}", f"{heads} heads of {self.head_dim}"]
        if self.value_head_dim != self.head_dim:
            parts.append(f"values of {self.value_head_dim}")
        parts.append(f"{self.mask_kind.value} mask" if self.mask_kind != MaskKind.NONE else "no mask")
        if self.is_causal:
            parts.append("causal" if self.query_len == "equal" else f"causal with a {self.query_len} query")
        parts += ["one part of a ring's"] * self.partial + ["a torch.func transform or forward mode"] * self.derived
        parts += (
            ["dropout"] * self.dropout + ["gradients"] * self.needs_grad + ["a bias gradient"] * self.bias_needs_grad
        )
        return ", ".join(parts)


class Serving(NamedTuple):
    """How a call is served: the provider and the lowerings. Plain values only, which compilers treat as constants."""

    provider: str
    layout: Layout
    repeat_kv: bool = False
    pad_head_dim: int = 0
    """Size to which head_dim is padded; 0 means no padding."""
    causal: str = "none"
    """How causality is applied: "none"; "kernel"; "mask", merged into the mask; "drop_keys" or "two_calls", see
    `lowering.py`."""
    mask_kind: MaskKind = MaskKind.NONE
    broadcast: bool = False
    """Whether batch sizes and numbers of heads that are one are expanded."""
    empty: bool = False
    """Whether there is no query or no key: the result is zeros, and no kernel is called."""
    source: str = PACKAGE
    """Source of the kernel: "package" or "hub"."""

    @property
    def adapter(self) -> type[Adapter]:
        """The adapter of the provider."""
        return registry.ADAPTERS[self.provider, self.source]

    @property
    def lowers(self) -> bool:
        """Whether `lowering.attention` changes the call at all."""
        return (
            self.repeat_kv
            or self.pad_head_dim > 0
            or self.causal in ("mask", "drop_keys", "two_calls")
            or self.broadcast
            or self.empty
        )


def refusal(spec: ProviderSpec, call: CallProperties) -> str:
    """Why `spec` cannot serve `call`, even with lowerings; empty if it can."""
    can = spec.capabilities
    if call.device.type not in (*can.devices, "meta"):
        return f"it runs on {_names(can.devices)}, not on {call.device.type}"
    compute_capability = can.min_compute_capability or can.compute_capabilities
    if call.device.type == "cuda" and compute_capability:
        reason = registry.capability_reason(spec, torch.cuda.get_device_capability(call.device))
        if reason:
            return reason
    if call.dtype not in can.dtypes:
        return f"it accepts {_names(str(dtype).removeprefix('torch.') for dtype in can.dtypes)}"
    if can.max_head_dim is not None and max(call.head_dim, call.value_head_dim) > can.max_head_dim:
        return f"its head_dim is at most {can.max_head_dim}"
    if call.value_head_dim != call.head_dim and not can.value_head_dim:
        return "its value must have the head_dim of its query"
    if call.heads and (not call.kv_heads or call.heads % call.kv_heads):
        return f"{call.heads} query heads do not divide into {call.kv_heads} key heads"
    if _mask_after_lowering(spec, call) not in can.masks:
        accepted = _names(kind.value for kind in can.masks if kind != MaskKind.NONE) or "none"
        return f"it accepts no {_mask_after_lowering(spec, call).value} mask (accepted masks: {accepted})"
    if call.is_causal and call.mask_kind == MaskKind.BLOCK:
        return "is_causal cannot be combined with a BlockMask; make the BlockMask causal instead"
    if call.is_causal and can.causal == "none":
        return "it has no causal kernel"
    if call.derived and not can.every_derivative:
        return "its kernel supports no transforms of torch.func and no forward-mode differentiation"
    if call.query_len != "equal" or call.mask_kind != MaskKind.NONE:
        counts = options_by_place(spec.name, call.options)
        if counts:
            return f"{counts[0]} counts positions: it needs a query and a key of equal lengths, and no mask"
    if call.dropout and not can.dropout:
        return "it has no dropout"
    if call.needs_grad and not (can.backward and call.device.type not in can.without_backward_on):
        return (
            f"it has no backward{'' if not can.backward else ' on ' + call.device.type} and an input requires a "
            "gradient (run inference under torch.no_grad())"
        )
    if call.bias_needs_grad and not can.bias_gradient:
        return "it computes no gradient of attn_mask, but attn_mask requires one"
    if call.partial and not can.lse:
        return (
            "it returns no log-sum-exp (lse), which a ring needs to merge partial results (set ring_degree=1 and use "
            "ulysses_degree, which works with any provider)"
        )
    if call.partial and call.needs_grad and not can.backward_of_parts:
        return (
            "it has no backward for a part of the keys, which a ring needs (set ring_degree=1 and use ulysses_degree, "
            "which works with any provider)"
        )
    if call.device.type == "cuda" and compute_capability:  # last, because it imports the package
        return registry.load(spec.name, chosen_source(spec, call.options)).check_device(call.device) or ""
    return ""


def _mask_after_lowering(spec: ProviderSpec, call: CallProperties) -> MaskKind:
    if not call.is_causal or call.mask_kind in (MaskKind.NONE, MaskKind.BLOCK):
        return call.mask_kind
    return MaskKind.DENSE if call.mask_kind in (MaskKind.KEY, MaskKind.DENSE) else MaskKind.BIAS


def serving_of(spec: ProviderSpec, call: CallProperties) -> Serving:
    """How `spec` serves a call that `refusal` accepts."""
    can = spec.capabilities
    mask_kind = _mask_after_lowering(spec, call)
    if not call.is_causal:
        causal = "none"
    elif mask_kind != MaskKind.NONE:
        causal = "mask"
    elif can.causal == "top_left" or call.query_len == "equal":
        causal = "kernel"
    else:
        causal = "drop_keys" if call.query_len == "shorter" else "two_calls"
    step = can.head_dim_multiple
    head_dim = max(call.head_dim, call.value_head_dim)
    source = chosen_source(spec, call.options)
    aligned = step == 1 or call.head_dim % step == call.value_head_dim % step == 0 < call.head_dim
    return Serving(
        provider=spec.name,
        layout=registry.load(spec.name, source).layout,
        repeat_kv=call.heads != call.kv_heads and not can.gqa,
        pad_head_dim=0 if aligned else -(-head_dim // step) * step,
        causal=causal,
        mask_kind=mask_kind,
        source=source,
    )


def _names(values) -> str:  # type: ignore[no-untyped-def]
    return ", ".join(sorted(values))
