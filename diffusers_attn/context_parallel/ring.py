"""Ring attention (Liu, Zaharia, Abbeel, arXiv 2310.01889): keys and values go from rank to rank.

Every rank keeps its queries. In each of as many steps as there are ranks it attends to the block that it holds, while
that block is on its way to the next rank and the previous rank's is coming. The results of the steps merge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import result
from . import exchange
from .blocks import Block, BlockAttention, make_block
from .mesh import Group
from .sharding import Shards


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of `call.group`.

    Args:
        query: `[batch, this rank's queries, heads, head_dim]`.
        key, value: `[batch, this rank's keys, kv_heads, head_dim]`.
        key_mask: `[batch | 1, this rank's keys]`, or None.
        rows: `[batch | 1, heads | 1, this rank's queries, all keys]`, keys in the order of the sequence; or None.

    Returns:
        `[batch, this rank's queries, heads, value_head_dim]`.
    """
    return _Ring.apply(query, key, value, key_mask, rows, call)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, rows, call: BlockAttention):  # type: ignore[no-untyped-def]
        group, shards = call.group, call.key_shards
        block = make_block(key, value, key_mask)
        merged: Any = None
        for step in range(group.size):
            owner = (group.rank - step) % group.size
            coming = _start_rotation(block, owner, shards, group) if step + 1 < group.size else []
            merged = call.forward(query, block, shards.runs[owner], rows, merged, last=step + 1 == group.size)
            block = [exchange.wait(tensor, group) for tensor in coming]
        out, lse = merged
        ctx.save_for_backward(query, key, value, key_mask, rows, out, lse)
        ctx.call = call
        return result(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        """The blocks go around once more. Each is followed by its gradient, to which every rank adds its share, and
        which is home after the last step."""
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        block = make_block(key, value, key_mask, grad_out)
        grad_query: Any = 0
        following: Block = []
        for step in range(group.size):
            owner = (group.rank - step) % group.size
            coming = _start_rotation(block, owner, shards, group) if step + 1 < group.size else []
            share = call.backward(grad_out, query, block, shards.runs[owner], rows, out, lse)
            grad_query = grad_query + share[0]
            grads = list(share[1:])
            if step > 0:
                grads = [own + exchange.wait(before, group) for own, before in zip(grads, following)]
            following = _start_rotation(grads, owner, shards, group)
            block = [exchange.wait(tensor, group) for tensor in coming]
        grad_key, grad_value = (exchange.wait(tensor, group).transpose(0, 1) for tensor in following)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _start_rotation(block: Block, owner: int, shards: Shards, group: Group) -> Block:
    """Sends `owner`'s block on; what comes belongs to the rank before `owner`."""
    coming = shards.sizes[(owner - 1) % group.size]
    return [exchange.start_to_next(tensor, coming, group) for tensor in block]
