"""Masks as flex_attention takes them, by blocks of tokens: made, and read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def block_mask(blocks: Tensor, size: int) -> BlockMask:
    """A `BlockMask` under which a block of `size` queries sees all of a block of `size` keys, or nothing of it.

    Args:
        blocks: which it sees, bool `[batch | 1, heads | 1, blocks of queries, blocks of keys]`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    several = [count > 1 for count in blocks.shape[:2]]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[batch if several[0] else 0, head if several[1] else 0, query // size, key // size]

    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # All blocks are whole, so that the kernel asks `sees` for none. It is there for flex_attention's uncompiled form,
    # which looks at nothing else.
    return BlockMask.from_kv_blocks(torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=size, mask_mod=sees)


def rows_of(mask: BlockMask, start: int, length: int, keys: int) -> Tensor:
    """What `length` queries from place `start` on see of the first `keys` keys, in a mask over a whole sequence: bool
    `[batch | 1, heads | 1, length, keys]`."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.kv_num_blocks.shape[:2]
    device = mask.kv_num_blocks.device
    if length == 0 or keys == 0:
        return torch.ones(batch, heads, length, keys, dtype=torch.bool, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.mask_mod(batch, head, query + start, key)

    return create_mask(sees, batch, heads, length, keys, device=device)
