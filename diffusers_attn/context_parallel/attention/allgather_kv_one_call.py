"""Attention to the keys of all ranks in one call, once they are there.

What hides their exchange is what the model computes beside keys and values: the queries, and in some models an MLP.
There is nothing to merge, and no second, smaller call of the kernel. But only a compiler has something else to compute
meanwhile (`overlap_pass`): called step by step, a model asks for attention when all of that is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing.symbolic import ceil_div, constant
from ..comm import collectives
from ..comm.symmetric_gather import EVERYONE, GatherInFlight
from ..comm.transport import SYMMETRIC
from .block_attention import BlockAttention

# Of H200s; what is decided by them is measured in docs/context_parallel.md.
BYTES_PER_SECOND = 320e9
"""that one GPU writes into another's memory."""
FLOPS = 650e12
"""of products of matrices in half precision."""
MEMORY_BYTES_PER_SECOND = 3.5e12
"""read and written."""
SECONDS_OF_A_SECOND_CALL = 60e-6
"""that attention takes longer in two calls: their last, half empty waves, and the merge."""


def allgather_kv_one_call_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
) -> Tensor:
    """As `kv_gather.allgather_kv_attention`, without gradients and through symmetric memory only."""
    group, shards = call.group, call.key_shards
    push = GatherInFlight.start(
        query, key.contiguous(), value.contiguous(), shards.sizes, group, needs_grad=False, shift=EVERYONE
    )
    masks = [] if key_mask is None else [collectives.start_gather(key_mask.transpose(0, 1), shards.sizes, group)]
    block = [tensor.transpose(0, 1) for tensor in push.finish(query)]
    block += [collectives.wait(mask, group) for mask in masks]
    return call.forward(query, block, sum(shards.spans, ()), rows, last=True)[0]


def is_faster(query: Tensor, key: Tensor, value: Tensor, call: BlockAttention) -> bool:
    """Whether, in the graph that is compiled, all keys should be awaited before attention begins.

    In place of a second call and a merge, it costs a copy of this rank's own keys and values to where the others'
    arrive, and what of the exchange the projection of the queries does not hide, which is taken to be as wide as they
    are. So it is for pictures rather than for videos. By what is the same on all ranks: in a graph for all lengths, by
    whether all tokens are fewer than a number, on which side of which the graph then stays.
    """
    if call.kernel.needs_grad or call.transport != SYMMETRIC or not torch.compiler.is_compiling():
        return False
    # All of it is proportional to the number of tokens.
    width = constant(query.shape[2]) * constant(query.shape[3])
    own = constant(key.shape[2]) * (constant(key.shape[3]) + constant(value.shape[3])) * key.element_size()
    arrival = (call.group.size - 1) * own / BYTES_PER_SECOND
    projection = 2 * width * width / FLOPS
    copy = 2 * own / MEMORY_BYTES_PER_SECOND
    limit = SECONDS_OF_A_SECOND_CALL / (max(0.0, arrival - projection) + copy)
    return True if query.shape[0] * ceil_div(call.key_shards.total, call.group.size) < limit else False
