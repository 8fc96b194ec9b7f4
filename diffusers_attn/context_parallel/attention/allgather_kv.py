"""Attention to gathered keys: those of all other ranks are fetched at once, under the attention to the local ones.

Two calls, one over the local keys and one over the rest, and one merge. It needs memory for the keys and values of all
ranks, and in exchange has few calls, each as large as can be, and one exchange that hides under the first of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tracing.functions import result
from ..comm import collectives
from ..comm.collectives import depends_on
from ..comm.symmetric_gather import GatherInFlight
from ..comm.transport import SYMMETRIC
from .block_attention import Block, BlockAttention, make_block


def allgather_kv_attention(
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
    if call.kernel.needs_grad:
        return _AllGatherKV.apply(query, key, value, key_mask, rows, call)
    return _forward(query, key, value, key_mask, rows, call)[0]


class _AllGatherKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, rows, call: BlockAttention):  # type: ignore[no-untyped-def]
        out, lse = _forward(query, key, value, key_mask, rows, call)
        # Not the rest: all layers' together are as large as the whole sequence's. The backward fetches it again.
        ctx.save_for_backward(query, key, value, key_mask, rows, out, lse)
        ctx.call = call
        return result(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        key, value = depends_on(key, grad_out), depends_on(value, grad_out)
        fetch = _start_fetch(query, key, value, key_mask, call)
        local = call.backward(grad_out, query, fetch.block, shards.spans[group.rank], rows, out, lse)
        rest = _finish_fetch(fetch, call, local[0])
        remote = call.backward(grad_out, query, rest, shards.without(group.rank), rows, out, lse)
        grad_query = local[0].to(torch.promote_types(query.dtype, torch.float32)) + remote[0]
        # Each rank has a share of every key's gradient; a key's owner adds them up.
        returning = [
            collectives.start_return_to_owners(share.to(tensor.dtype), shards.sizes, group)
            for share, tensor in zip(remote[1:], (key, value))
        ]
        del fetch, rest, remote  # as large as the keys of all ranks, and so is what now comes
        grad_key, grad_value = (
            (own + collectives.sum_of_parts(collectives.wait(shares, group), group.size - 1)).transpose(0, 1)
            for own, shares in zip(local[1:], returning)
        )
        # A compiler sees no order between this return and the fetch of the layer before, where their keys have nothing
        # to do with each other; and ranks that take different ones wait for each other for ever.
        grad_query = depends_on(grad_query.to(query.dtype), grad_key, grad_value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, rows: Tensor | None, call: BlockAttention
) -> tuple[Tensor, Tensor]:
    """Output, in the query's dtype, and lse."""
    rank, shards = call.group.rank, call.key_shards
    fetch = _start_fetch(query, key, value, key_mask, call)
    result = call.forward(query, fetch.block, shards.spans[rank], rows)
    rest = _finish_fetch(fetch, call, result[0])
    return call.forward(query, rest, shards.without(rank), rows, result, last=True)


class _Fetch(NamedTuple):
    """Blocks on their way."""

    block: Block
    """this rank's own."""
    coming: Block
    """what collectives bring."""
    push: GatherInFlight | None
    """what brings key and value where the collectives do not."""


def _start_fetch(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, call: BlockAttention) -> _Fetch:
    """Sends this rank's `[batch, seq, ...]` to all others."""
    sizes, group = call.key_shards.sizes, call.group
    if call.transport != SYMMETRIC:
        block = make_block(key, value, key_mask)
        return _Fetch(block, [collectives.start_gather_others(tensor, sizes, group) for tensor in block], None)
    push = GatherInFlight.start(
        query, key.contiguous(), value.contiguous(), sizes, group, needs_grad=call.kernel.needs_grad
    )
    masks = [] if key_mask is None else [key_mask.transpose(0, 1)]
    coming = [collectives.start_gather_others(mask, sizes, group) for mask in masks]  # they are small
    return _Fetch([*(tensor.transpose(0, 1) for tensor in push.held[:2]), *masks], coming, push)


def _finish_fetch(fetch: _Fetch, call: BlockAttention, meanwhile: Tensor) -> Block:
    """The block of all other ranks. `meanwhile`: what was computed since it was started."""
    rest = [collectives.wait(tensor, call.group) for tensor in fetch.coming]
    if fetch.push is None:
        return rest
    return [*(tensor.transpose(0, 1) for tensor in fetch.push.finish(meanwhile)), *rest]
