"""Ring attention (Liu, Zaharia, Abbeel, arXiv 2310.01889): keys and values go from rank to rank.

Every rank keeps its queries. There are as many steps as ranks. In each step a rank attends to the block of keys and
values that it holds, while that block is on its way to the next rank and the block of the previous rank arrives. The
results of the steps merge by their log-sum-exp. `kv_exchange` moves the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...tracing.functions import result
from ..comm.collectives import depends_on
from ..comm.packed_kv import pack, tails_of, unpack
from .block_attention import BlockAttention
from .kv_exchange import RINGS, Message, start_rotation, wait_for


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
        query: `[batch, local queries, heads, head_dim]`.
        key: `[batch, local keys, kv_heads, head_dim]`.
        value: `[batch, local keys, kv_heads, value_head_dim]`.
        key_mask: `[batch | 1, local keys]`, or None.
        rows: `[batch | 1, heads | 1, local queries, all keys]`, keys in the order of the sequence; or None.

    Returns:
        `[batch, local queries, heads, value_head_dim]`.
    """
    if call.kernel.needs_grad:
        return _Ring.apply(query, key, value, key_mask, rows, call)
    return _forward(query, key, value, key_mask, rows, call)[0]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, rows: Tensor | None, call: BlockAttention
) -> tuple[Tensor, Tensor]:
    """The output, in the query's dtype, and the lse."""
    rank, size = call.group.rank, call.group.size
    ring = RINGS[call.transport].start(query, key, value, key_mask, call)
    merged: Any = None
    for step in range(size):
        if step > 0:
            ring = ring.next(merged[0])
        spans = call.key_shards.spans[(rank - step) % size]
        merged = call.forward(query, ring.block, spans, rows, merged, last=step + 1 == size)
    return merged


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, rows, call: BlockAttention):  # type: ignore[no-untyped-def]
        out, lse = _forward(query, key, value, key_mask, rows, call)
        ctx.save_for_backward(query, key, value, key_mask, rows, out, lse)
        ctx.call = call
        return result(out)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        """The blocks go around once more. The gradient of a block follows it one step behind: every rank adds its
        share, and after the last step the gradient is back at the block's owner."""
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        wide = torch.promote_types(query.dtype, torch.float32)
        ring = RINGS[call.transport].start(query, key, value, key_mask, call, grad_out)
        shares: Any = None
        grad_query: Any = 0
        in_flight: Message = []
        for step in range(group.size):
            if step > 0:
                ring = ring.next(shares[0])
            owner = (group.rank - step) % group.size
            shares = call.backward(grad_out, query, ring.block, shards.spans[owner], rows, out, lse)
            grad_query = grad_query + shares[0].to(wide)
            grads = pack(*(share.to(wide) for share in shares[1:]))
            if step > 0:
                grads = grads + wait_for(in_flight, call)[0]
            in_flight = start_rotation([grads], owner, call)
        arrived = unpack(wait_for(in_flight, call)[0], tails_of(key, value))
        grad_key, grad_value = (tensor.transpose(0, 1) for tensor in arrived)
        # A compiler sees no order between these exchanges and those of the layer before.
        grad_query = depends_on(grad_query.to(query.dtype), grad_key, grad_value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None
