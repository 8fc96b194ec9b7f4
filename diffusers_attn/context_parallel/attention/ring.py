"""Ring attention (Liu, Zaharia, Abbeel, arXiv 2310.01889): keys and values go from rank to rank.

Every rank keeps its queries. In each of as many steps as there are ranks it attends to the block that it holds, while
that block is on its way to the next rank and the previous rank's is coming. The results of the steps merge.

Where ranks write into each other's memory (`symmetric_gather`), a block need not travel through them: in every step
each rank sends its own, to the rank that is one further than in the step before. What comes is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tracing.functions import result
from ..comm import collectives
from ..comm.collectives import depends_on
from ..comm.group import Group
from ..comm.symmetric_gather import GatherInFlight
from ..comm.transport import SYMMETRIC
from ..sequences.sharding import Shards
from .block_attention import Block, BlockAttention, make_block


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
    if call.kernel.needs_grad:
        return _Ring.apply(query, key, value, key_mask, rows, call)
    return _forward(query, key, value, key_mask, rows, call)[0]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, rows: Tensor | None, call: BlockAttention
) -> tuple[Tensor, Tensor]:
    """Output, in the query's dtype, and lse."""
    size = call.group.size
    hands = _Hands.start(query, key, value, key_mask, call)
    merged: Any = None
    for step in range(size):
        spans = call.key_shards.spans[(call.group.rank - step) % size]
        merged = call.forward(query, hands.block, spans, rows, merged, last=step + 1 == size)
        hands = hands.next(merged[0])
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
        """The blocks go around once more. Each is followed by its gradient, to which every rank adds its share, and
        which is home after the last step."""
        query, key, value, key_mask, rows, out, lse = ctx.saved_tensors
        call: BlockAttention = ctx.call
        group, shards = call.group, call.key_shards
        wide = torch.promote_types(query.dtype, torch.float32)
        hands = _Hands.start(query, key, value, key_mask, call, grad_out)
        grad_query: Any = 0
        following: Block = []
        for step in range(group.size):
            owner = (group.rank - step) % group.size
            parts = call.backward(grad_out, query, hands.block, shards.spans[owner], rows, out, lse)
            grad_query = grad_query + parts[0].to(wide)
            grads = [part.to(wide) for part in parts[1:]]
            if step > 0:
                grads = [own + collectives.wait(before, group) for own, before in zip(grads, following)]
            following = _start_rotation(grads, owner, shards, group)
            hands = hands.next(parts[0])
        grad_key, grad_value = (collectives.wait(tensor, group).transpose(0, 1) for tensor in following)
        # A compiler sees no order between what this sends and what the layer before does.
        grad_query = depends_on(grad_query.to(query.dtype), grad_key, grad_value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


class _Hands(NamedTuple):
    """The block that a rank holds, and the next one, which is under way."""

    call: BlockAttention
    step: int
    block: Block
    coming: Block
    """what collectives bring: all of the block, or its mask alone."""
    push: GatherInFlight | None
    """what brings key and value where collectives do not."""

    @staticmethod
    def start(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        call: BlockAttention,
        grad_out: Tensor | None = None,
    ) -> _Hands:
        """This rank's own block, of `[batch, seq, ...]` tensors; sent once `grad_out` is there, if it is given."""
        if call.transport != SYMMETRIC:
            block = make_block(key, value, key_mask, grad_out)
            return _Hands(call, 0, block, _start_rotation(block, call.group.rank, call.key_shards, call.group), None)
        key, value = (depends_on(tensor, grad_out).contiguous() for tensor in (key, value))
        push = GatherInFlight.start(
            query, key, value, call.key_shards.sizes, call.group, needs_grad=call.kernel.needs_grad, shift=1
        )
        masks = [] if key_mask is None else [depends_on(key_mask, grad_out).transpose(0, 1).contiguous()]
        coming = _start_rotation(masks, call.group.rank, call.key_shards, call.group)
        return _Hands(call, 0, [*(tensor.transpose(0, 1) for tensor in push.held[:2]), *masks], coming, push)

    def next(self, meanwhile: Tensor) -> _Hands:
        """What is there one step later. `meanwhile`: what was computed with this block."""
        call, step = self.call, self.step + 1
        if step == call.group.size:
            return self
        block = [collectives.wait(tensor, call.group) for tensor in self.coming]
        masks, push = block if self.push else [], self.push
        if push is not None:
            block = [*(tensor.transpose(0, 1) for tensor in push.finish(meanwhile)), *block]
        if step + 1 == call.group.size:  # nobody needs another
            return _Hands(call, step, block, [], None)
        owner = (call.group.rank - step) % call.group.size
        coming = _start_rotation(masks if push else block, owner, call.key_shards, call.group)
        return _Hands(call, step, block, coming, push.again(step + 1) if push else None)


def _start_rotation(block: Block, owner: int, shards: Shards, group: Group) -> Block:
    """Sends `owner`'s block on; what comes belongs to the rank before `owner`."""
    coming = shards.sizes[(owner - 1) % group.size]
    return [collectives.start_to_next(tensor, coming, group) for tensor in block]
