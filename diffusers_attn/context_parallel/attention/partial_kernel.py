"""One provider's attention to the keys that are present, on `[batch, seq, heads, head_dim]`.

It is either complete and differentiable, or partial. A partial forward returns the output with its log-sum-exp; a
partial backward takes the output and log-sum-exp of all parts. A part is decided and lowered as a whole call is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import masks
from ...call import AttentionCall
from ...masks import MaskKind
from ...providers import catalog, lowering
from ...providers.base import Params
from ...providers.catalog import SPECS
from ...providers.decision import decide_call
from ...providers.serving import Serving
from ..comm.collectives import depends_on
from ..sequences.block_masks import block_mask


class PartialKernel(NamedTuple):
    """A provider with the settings that all parts of a call share. Plain values only."""

    provider: str
    options: tuple[tuple[str, object], ...] = ()
    scale: float | None = None
    """Factor of the scores; None is `head_dim ** -0.5`."""
    needs_grad: bool = False
    block: int = 1
    """Tokens, of queries as of keys, that an entry of a mask stands for."""
    by_place: tuple[str, ...] = ()
    """Options that depend on positions in the full sequence, which a part of it does not serve."""

    def check(
        self, query: Tensor, key: Tensor, value: Tensor, mask_kind: MaskKind, is_causal: bool, partial: bool
    ) -> str:
        """Checks that this provider serves such a call. Reads only what is equal on all ranks, so that either all ranks
        raise or none does, before data moves.

        Args:
            partial: whether the call is one of several, each over a part of the keys.

        Returns:
            The name of the provider: that which "auto" chooses, or the one that was named.

        Raises:
            AttentionProviderError: the provider does not serve the call.
        """
        call = self._call(query, key, value, is_causal)
        return decide_call(call, mask_kind, partial=partial, compare_lengths=False)[0].provider

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Complete, differentiable attention."""
        if query.numel() == 0 or key.numel() == 0:
            # A product, so that gradients flow here as they do on ranks that have something to compute.
            sums = query.sum(dim=-1, keepdim=True) * key.sum(dim=(1, 2, 3), keepdim=True)
            return depends_on(sums * value.sum(dim=(1, 2), keepdim=True) * 0.0, mask)
        serving, params, mask = self._prepare(query, key, value, mask, is_causal, partial=False)
        query, key, value = lowering.to_layout(serving, query, key, value)
        adapter = serving.adapter
        out = lowering.attention(query, key, value, mask, adapter=adapter, serving=serving, params=params)
        return lowering.to_layout(serving, out)[0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The output `[batch, query_len, heads, value_head_dim]` and lse `[batch, query_len, heads]` over these keys.

        Args:
            mask: broadcastable to `[batch, heads, query_len, key_len]`, or None.
            is_causal: only for equal lengths.
        """
        if query.numel() == 0 or key.numel() == 0:
            wide = torch.promote_types(query.dtype, torch.float32)
            out = value.new_zeros(*query.shape[:3], value.shape[-1])
            lse = query.new_full(query.shape[:3], -math.inf, dtype=wide)
            return depends_on(out, key, value, mask), lse
        serving, params, mask = self._prepare(query, key, value, mask, is_causal, partial=True)
        return lowering.forward(serving, params, query, key, value, mask)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These keys' share of the gradients of query, key and value. `out` and `lse` are those over all keys."""
        if query.numel() == 0 or key.numel() == 0:
            return (
                depends_on(torch.zeros_like(query), key, value, mask),
                depends_on(torch.zeros_like(key), grad_out, key),
                depends_on(torch.zeros_like(value), grad_out, value),
            )
        serving, params, mask = self._prepare(query, key, value, mask, is_causal, partial=True)
        return lowering.backward(serving, params, grad_out, query, key, value, mask, out, lse)

    @property
    def block_kind(self) -> MaskKind:
        """The kind in which this provider receives a mask by blocks. "auto" looks for a provider that takes blocks:
        token by token, the mask of a sequence that is long enough for blocks would not fit into memory."""
        by_block = self.provider == "auto" or MaskKind.BLOCK in SPECS[self.provider].capabilities.masks
        return MaskKind.BLOCK if by_block else MaskKind.DENSE

    def _prepare(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, *, partial: bool
    ) -> tuple[Serving, Params, Any]:
        """How the call is served, the kernel's constants, and the mask as a 4-D view."""
        sizes = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
        kind, view = masks.classify(self._by_token(mask), *sizes)
        serving, params = decide_call(self._call(query, key, value, is_causal), kind, partial=partial)
        return serving, params, view

    def _by_token(self, mask: Tensor | None) -> Any:
        """A mask by blocks in the form that this provider takes; any other mask as it is."""
        if mask is None or self.block == 1:
            return mask
        if self.block_kind == MaskKind.BLOCK:
            return block_mask(mask, self.block)
        return mask.repeat_interleave(self.block, dim=-2).repeat_interleave(self.block, dim=-1)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> AttentionCall:
        """The call of a part, without its mask: masks of parts need no gradient."""
        return AttentionCall(
            query, key, value, is_causal=is_causal, scale=self.scale, provider=self.provider, options=self.options,
            needs_grad=self.needs_grad,
        )  # fmt: skip


@torch._dynamo.assume_constant_result
def options_by_place(provider: str, options: tuple[tuple[str, object], ...]) -> tuple[str, ...]:
    """`catalog.options_by_place`, also while a compiler traces."""
    return catalog.options_by_place(provider, options)
