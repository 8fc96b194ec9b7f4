"""Makes and reads the block masks of flex_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def block_mask(blocks: Tensor, size: int) -> BlockMask:
    """A `BlockMask` in which each block of queries attends to all of a block of keys, or to none of it.

    Args:
        blocks: which blocks attend to which, bool `[batch | 1, heads | 1, blocks of queries, blocks of keys]`.
        size: tokens per block, of queries as of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    several = [count > 1 for count in blocks.shape[:2]]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[batch if several[0] else 0, head if several[1] else 0, query // size, key // size]

    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # All blocks are full, so that the kernel calls `sees` for none of them. The uncompiled form of flex_attention uses
    # `sees` only.
    return BlockMask.from_kv_blocks(torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=size, mask_mod=sees)


def rows_of(mask: BlockMask, start: int, length: int, keys: int) -> Tensor:
    """The rows of a mask over a full sequence, bool `[batch | 1, heads | 1, length, keys]`.

    Args:
        start, length: position and number of the queries.
        keys: number of keys, from the first.
    """
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.kv_num_blocks.shape[:2]
    device = mask.kv_num_blocks.device
    if length == 0 or keys == 0:
        return torch.ones(batch, heads, length, keys, dtype=torch.bool, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.mask_mod(batch, head, query + start, key)

    return create_mask(sees, batch, heads, length, keys, device=device)
