"""Attention with gathered keys: the keys of all other ranks are fetched at once, under the attention to the local ones.

There are two calls of the kernel, one over the local keys and one over all others, and one merge. Few, large calls are
fast, and the only exchange hides under the first. The price is memory for the keys and values of all ranks.

On two H200, a layer of Flux takes 327 µs in this way and 440 with Ulysses; one of Wan 1.3B 6,127 and 6,455
(docs/design.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing.functions import result
from ..comm import collectives
from ..comm.collectives import depends_on
from ..comm.packed_kv import pack, tails_of, unpack
from .block_attention import BlockAttention
from .kv_exchange import FETCHES


def allgather_kv_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of `call.group`; as `ring.ring_attention`."""
    if call.kernel.needs_grad:
        return _AllGatherKV.apply(query, key, value, key_mask, rows, call)
    return _forward(query, key, value, key_mask, rows, call)[0]


class _AllGatherKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, rows, call: BlockAttention):  # type: ignore[no-untyped-def]
        out, lse = _forward(query, key, value, key_mask, rows, call)
        # The fetched keys are not saved: those of all layers would fill the memory. The backward fetches them again.
        ctx.save_for_backward(query, key, value, key_mask, rows, out, lse)
        ctx.call = call
        return result(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        key = depends_on(key, grad_out, sent_over=group)
        value = depends_on(value, grad_out)
        fetch = FETCHES[call.transport].start(query, key, value, key_mask, call)
        local = call.backward(grad_out, query, fetch.block, shards.spans[group.rank], rows, out, lse)
        others = fetch.finish(local[0])
        remote = call.backward(grad_out, query, others, shards.without(group.rank), rows, out, lse)
        grad_query = local[0].to(torch.promote_types(query.dtype, torch.float32)) + remote[0]
        # Every rank has a share of the gradient of every key; the owner of a key adds the shares up.
        shares = pack(*(share.to(tensor.dtype) for share, tensor in zip(remote[1:], (key, value))))
        returning = collectives.start_return_to_owners(shares, shards.sizes, group)
        del fetch, others, remote, shares  # as large as the keys of all ranks; so are the shares that arrive now
        arrived = collectives.sum_of_parts(collectives.wait(returning, group), group.size - 1)
        grad_key, grad_value = (
            (own + others).transpose(0, 1) for own, others in zip(local[1:], unpack(arrived, tails_of(key, value)))
        )
        # Without this dependency a compiler may swap this exchange with the fetch of the layer before. Ranks with
        # different orders would wait for each other forever.
        grad_query = depends_on(grad_query.to(query.dtype), grad_key, grad_value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, rows: Tensor | None, call: BlockAttention
) -> tuple[Tensor, Tensor]:
    """The output, in the query's dtype, and the lse."""
    rank, shards = call.group.rank, call.key_shards
    fetch = FETCHES[call.transport].start(query, key, value, key_mask, call)
    local = call.forward(query, fetch.block, shards.spans[rank], rows)
    others = fetch.finish(local[0])
    return call.forward(query, others, shards.without(rank), rows, local, last=True)
