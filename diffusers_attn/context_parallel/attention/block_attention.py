"""Attention of the local queries to one block of keys and values after another, as `ring` and `allgather_kv` use it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm.collectives import depends_on
from ..comm.group import Group
from ..comm.transport import COLLECTIVE
from ..sequences.causal_tiles import Tile, tiles
from ..sequences.rectangles import Rectangle, tiles_within
from ..sequences.sharding import Shards, Span, in_blocks, take
from .merge import merge
from .partial_kernel import PartialKernel

Block = list[Tensor]
"""Key and value `[seq, batch, heads, head_dim]` and, if there is one, the key mask `[seq, batch]`. The sequence comes
first, as in an exchange."""


class BlockAttention(NamedTuple):
    """The constants of one call over a ring."""

    kernel: PartialKernel
    group: Group
    query_shards: Shards
    key_shards: Shards
    is_causal: bool = False
    convert_to_fp32: bool = True
    transport: str = COLLECTIVE
    """Kind of the `Transport` that moves keys and values to other ranks."""
    seen: tuple[Rectangle, ...] | None = None
    """Rectangles of queries and keys that see each other; None if all do. Excludes causality and masks."""

    def forward(
        self,
        query: Tensor,
        block: Block,
        spans: tuple[Span, ...],
        rows: Tensor | None,
        so_far: tuple[Tensor, Tensor] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The output and lse over the keys of `so_far` and of `block`. The output has the dtype in which partial
        results merge; or the query's dtype, if it comes from a single call of the kernel or `last` is True.

        Args:
            query: `[batch, query_len, heads, head_dim]`.
            block: the keys and values of this step.
            spans: positions of these keys in the full sequence.
            rows: mask of the local queries over all keys, `[batch | 1, heads | 1, query_len, all keys]`; one entry per
                block of tokens if the kernel has blocks.
            so_far: output and lse over the earlier blocks, or None.
            last: whether this is the last block.
        """
        tiles = self._tiles(spans)
        mask = self._mask(block, rows, spans)
        dtype = self._merge_dtype(query)
        if _is_one_tile(tiles, query, block):
            part = self.kernel.forward(query, *_batch_first(block), mask, tiles[0].is_causal)
            if so_far is None:
                return part
            return merge(*so_far, *part, dtype=dtype, out_dtype=query.dtype if last else dtype)
        if so_far is None:
            out = query.new_zeros(*query.shape[:3], block[1].shape[-1], dtype=dtype)
            lse = query.new_full(query.shape[:3], -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        else:
            out, lse = so_far[0].to(dtype), so_far[1]
        for tile in tiles:
            part = self.kernel.forward(*_cut(tile, query, block, mask), tile.is_causal)
            if tile.query[1] == query.shape[1]:
                out, lse = merge(out, lse, *part, dtype=dtype)
            else:
                some_out, some_lse = out.narrow(1, *tile.query), lse.narrow(1, *tile.query)
                merged_out, merged_lse = merge(some_out, some_lse, *part, dtype=dtype)
                some_out.copy_(merged_out)
                some_lse.copy_(merged_lse)
        out = out if tiles else depends_on(out, *block)
        return out.to(query.dtype) if last else out, lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        block: Block,
        spans: tuple[Span, ...],
        rows: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This block's share of the gradient of the query, and of the gradients of its key and value (sequence first).
        The dtype is the kernel's; sums of several calls are float32 at least."""
        tiles = self._tiles(spans)
        mask = self._mask(block, rows, spans)
        if _is_one_tile(tiles, query, block):
            grads = self.kernel.backward(grad_out, query, *_batch_first(block), mask, tiles[0].is_causal, out, lse)
            return grads[0], grads[1].transpose(0, 1), grads[2].transpose(0, 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        totals = [torch.zeros_like(tensor, dtype=wide) for tensor in (query, block[0], block[1])]
        for tile in tiles:
            tile_query, key, value, tile_mask = _cut(tile, query, block, mask)
            some = [tensor.narrow(1, *tile.query) for tensor in (grad_out, out, lse)]
            grads = self.kernel.backward(some[0], tile_query, key, value, tile_mask, tile.is_causal, some[1], some[2])
            totals[0].narrow(1, *tile.query).add_(grads[0])
            totals[1].narrow(0, *tile.key).add_(grads[1].transpose(0, 1))
            totals[2].narrow(0, *tile.key).add_(grads[2].transpose(0, 1))
        if not tiles:
            return (
                depends_on(totals[0], *block),
                depends_on(totals[1], grad_out, block[0]),
                depends_on(totals[2], grad_out, block[1]),
            )
        return totals[0], totals[1], totals[2]

    def _merge_dtype(self, query: Tensor) -> torch.dtype:
        return torch.promote_types(query.dtype, torch.float32) if self.convert_to_fp32 else query.dtype

    def _tiles(self, spans: tuple[Span, ...]) -> list[Tile]:
        queries = self.query_shards.spans[self.group.rank]
        return tiles(queries, spans, self.is_causal) if self.seen is None else tiles_within(self.seen, queries, spans)

    def _mask(self, block: Block, rows: Tensor | None, spans: tuple[Span, ...]) -> Tensor | None:
        """The mask over the keys of a block: `[batch | 1, heads | 1, query_len | 1, keys of the block]`."""
        if rows is not None:
            return take(rows, in_blocks(spans, self.kernel.block), dim=-1)
        return block[2].transpose(0, 1)[:, None, None, :] if len(block) == 3 else None


def _is_one_tile(tiles: list[Tile], query: Tensor, block: Block) -> bool:
    return len(tiles) == 1 and tiles[0].query[1] == query.shape[1] and tiles[0].key[1] == block[0].shape[0]


def _batch_first(block: Block) -> tuple[Tensor, Tensor]:
    return block[0].transpose(0, 1), block[1].transpose(0, 1)


def _cut(tile: Tile, query: Tensor, block: Block, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and mask of one tile."""
    key, value = (tensor.narrow(1, *tile.key) for tensor in _batch_first(block))
    if mask is not None:
        mask = mask.narrow(-1, *tile.key)
        if mask.shape[2] > 1:
            mask = mask.narrow(2, *tile.query)
    return query.narrow(1, *tile.query), key, value, mask
