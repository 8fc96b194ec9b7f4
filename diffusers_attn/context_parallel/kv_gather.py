"""Attention to gathered keys: those of all other ranks are fetched at once, under the attention to the local ones.

Two calls, one over the local keys and one over the rest, and one merge. It needs memory for the keys and values of all
ranks, and in exchange has few calls, each as large as can be, and one exchange that hides under the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import exchange
from .blocks import Block, BlockAttention, make_block


def kv_gather_attention(
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
    return _KVGather.apply(query, key, value, key_mask, rows, call)


class _KVGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, rows, call: BlockAttention):  # type: ignore[no-untyped-def]
        group, shards = call.group, call.key_shards
        block = make_block(key, value, key_mask)
        coming = _start_fetch(block, call)
        result = call.forward(query, block, shards.runs[group.rank], rows)
        rest = [exchange.wait(tensor, group) for tensor in coming]
        result = call.forward(query, rest, shards.without(group.rank), rows, result)
        out, lse = result[0].to(query.dtype), result[1]
        # Not the rest: all layers' together are as large as the whole sequence's. The backward fetches it again.
        ctx.save_for_backward(query, key, value, key_mask, rows, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        block = make_block(key, value, key_mask, grad_out)
        coming = _start_fetch(block, call)
        local = call.backward(grad_out, query, block, shards.runs[group.rank], rows, out, lse)
        rest = [exchange.wait(tensor, group) for tensor in coming]
        remote = call.backward(grad_out, query, rest, shards.without(group.rank), rows, out, lse)
        # Each rank has a share of every key's gradient; a key's owner adds them up.
        returning = [
            exchange.start_return_to_owners(share.to(tensor.dtype), shards.sizes, group)
            for share, tensor in zip(remote[1:], (key, value))
        ]
        grad_query = local[0] + remote[0]
        grad_key, grad_value = (
            (own + exchange.sum_of_parts(exchange.wait(shares, group), group.size - 1)).transpose(0, 1)
            for own, shares in zip(local[1:], returning)
        )
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _start_fetch(block: Block, call: BlockAttention) -> Block:
    return [exchange.start_gather_others(tensor, call.key_shards.sizes, call.group) for tensor in block]
