"""The description of one attention call: made by the entry, read by all later stages, which replace single fields."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import shapes, tensor_kinds
from .errors import AttentionProviderError
from .shapes import Layout
from .tensor_kinds import TensorKind, Way


class AttentionCall(NamedTuple):
    """One attention call: its tensors, its settings, and the provider that serves it."""

    query: Tensor
    """`[batch, query_len, heads, head_dim]`; or `[..., heads, query_len, head_dim]` if the layout is "bhsd"."""
    key: Tensor
    """`[batch, key_len, kv_heads, head_dim]`, or as the query."""
    value: Tensor
    """`[batch, key_len, kv_heads, value_head_dim]`, or as the query."""
    mask: Any = None
    """Broadcastable to `[..., heads, query_len, key_len]` in both layouts: a bool tensor (True takes part), a floating
    tensor (added to the scores), a mask object such as a `BlockMask`, or None."""
    dropout_p: float = 0.0
    """Probability of dropping an attention weight."""
    is_causal: bool = False
    """Whether query i sees only keys up to i."""
    scale: float | None = None
    """Factor of the scores; None is `head_dim ** -0.5`."""
    enable_gqa: bool = False
    """Whether the number of heads may be a multiple of that of the keys."""
    layout: Layout = "bshd"
    provider: str = "native"
    """Name of the active provider."""
    options: tuple[tuple[str, object], ...] = ()
    """Options of the provider, sorted by name."""
    needs_grad: bool = False
    """Whether a gradient of query, key or value may be computed."""
    not_plain: tuple[str, TensorKind] | None = None
    """Name and kind of the first argument that is not a plain tensor; None if all are plain."""

    @property
    def derived(self) -> bool:
        """Whether the call is inside a transform of torch.func or differentiated in forward mode."""
        return self.not_plain is not None and self.not_plain[1].way == Way.DERIVED

    @property
    def heads_dim(self) -> int:
        """The dimension of heads, of tensors with four dimensions."""
        return 1 if self.layout == "bhsd" else 2

    @property
    def seq_dim(self) -> int:
        """The dimension of the sequence, of tensors with four dimensions."""
        return 2 if self.layout == "bhsd" else 1

    @property
    def has_four_dims(self) -> bool:
        return self.query.ndim == self.key.ndim == self.value.ndim == 4

    def sizes(self) -> tuple[int, int, int, int]:
        """batch, heads, query_len and key_len, of tensors with four dimensions."""
        query, key, value, joint = self.query.shape, self.key.shape, self.value.shape, shapes.joint
        heads, seq = self.heads_dim, self.seq_dim
        return (
            joint(query[0], key[0], value[0]),
            joint(query[heads], key[heads], value[heads]),
            query[seq],
            key[seq],
        )

    def check(self) -> None:
        """Checks all that can be checked without knowing the provider, and which rank has which tokens.

        Raises:
            AttentionProviderError: shapes, dtypes or devices do not fit together, or a setting is out of its range.
        """
        query, mask = self.query, self.mask
        tensor_kinds.check_quantised(query, self.key, self.value)
        shapes.check(query, self.key, self.value, self.enable_gqa, self.layout)
        dropout_p, scale = self.dropout_p, self.scale
        if dropout_p is None or isinstance(dropout_p, str) or not 0.0 <= dropout_p <= 1.0:
            raise AttentionProviderError(f"dropout_p={dropout_p!r} was given; a probability from 0 to 1 is accepted.")
        if isinstance(scale, str):
            raise AttentionProviderError(f"scale={scale!r} was given; a number is accepted, or None for the default.")
        if not isinstance(mask, Tensor):
            return
        if mask.device != query.device:
            raise AttentionProviderError(
                f"attn_mask is on {mask.device} and query on {query.device}; both must be on one device. "
                "Pass mask.to(query.device)."
            )
        if mask.dtype.is_floating_point and mask.dtype not in (query.dtype, torch.float32):
            raise AttentionProviderError(
                f"attn_mask has dtype {mask.dtype} and the query {query.dtype}; torch.bool, torch.float32 and the "
                "query's dtype are accepted for attn_mask. Pass mask.to(query.dtype)."
            )

    def four_dims(self) -> AttentionCall:
        """The call with tensors of four dimensions; see `shapes.four_dims`."""
        if self.has_four_dims:
            return self
        query, key, value, mask = shapes.four_dims(self.query, self.key, self.value, self.mask)
        return self._replace(query=query, key=key, value=value, mask=mask)

    def broadcast(self) -> AttentionCall:
        """The call with one batch size, and numbers of heads that divide the query's; see `shapes.broadcast`. The
        tensors have four dimensions."""
        tensors = self.query, self.key, self.value
        if not shapes.differ(*tensors, self.heads_dim):
            return self
        query, key, value = shapes.broadcast(*tensors, self.heads_dim)
        return self._replace(query=query, key=key, value=value)

    def in_layout(self, layout: Layout) -> AttentionCall:
        """The call with tensors of four dimensions as views in `layout`."""
        if layout == self.layout:
            return self
        query, key, value = self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)
        return self._replace(query=query, key=key, value=value, layout=layout)
