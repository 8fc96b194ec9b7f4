"""Attention to the keys of all ranks in one call, after all keys have arrived.

The exchange hides under the other projections of the layer: the queries, and in some models an MLP. There is no second
call of the kernel and no merge. Only a compiler can overlap these (`overlap_pass`): in eager mode, the projections are
done before attention is called. A step of Flux on four H200 takes 41.0 ms in this way and 42.1 with two calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...providers import hardware
from ...tracing.symbolic import ceil_div, constant
from ..comm import collectives
from ..comm.gather_in_flight import GatherInFlight
from ..comm.gathered_rows import EVERYONE
from ..comm.transport import SYMMETRIC
from .block_attention import BlockAttention

# Figures of the reference device. docs/performance.md has measurements of the decisions that follow from them.
BYTES_PER_SECOND = hardware.REFERENCE_COPIES.bytes_per_second
FLOPS = hardware.REFERENCE.matrix_flops
MEMORY_BYTES_PER_SECOND = hardware.REFERENCE.memory_bytes_per_second
SECONDS_OF_A_SECOND_CALL = hardware.SECONDS_OF_A_SECOND_CALL


def allgather_kv_one_call_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
) -> Tensor:
    """As `allgather_kv_attention`, without gradients and only with the symmetric transport."""
    group, shards = call.group, call.key_shards
    gather = GatherInFlight.start(query, key, value, shards.sizes, group, needs_grad=False, shift=EVERYONE)
    masks = [] if key_mask is None else [collectives.start_gather(key_mask.transpose(0, 1), shards.sizes, group)]
    block = [tensor.transpose(0, 1) for tensor in gather.finish(query)]
    block += [collectives.wait(mask, group) for mask in masks]
    return call.forward(query, block, sum(shards.spans, ()), rows, last=True)[0]


def is_faster(query: Tensor, key: Tensor, value: Tensor, call: BlockAttention) -> bool:
    """Whether one call is faster in the graph that is being compiled.

    One call saves a second call and a merge. It costs a copy of the local keys and values to the receiving memory, and
    the part of the exchange that the query projection does not hide. (The projection is assumed to be as wide as the
    queries.) So it suits images rather than videos. The decision depends only on values that are equal on all ranks.
    In a graph with dynamic lengths it becomes a guard on the number of tokens.
    """
    if call.kernel.needs_grad or call.transport != SYMMETRIC or not torch.compiler.is_compiling():
        return False
    # Times per token: all of them are proportional to the number of tokens.
    width = constant(query.shape[2]) * constant(query.shape[3])
    own = constant(key.shape[2]) * (constant(key.shape[3]) + constant(value.shape[3])) * key.element_size()
    arrival = (call.group.size - 1) * own / BYTES_PER_SECOND
    projection = 2 * width * width / FLOPS
    copy = 2 * own / MEMORY_BYTES_PER_SECOND
    limit = SECONDS_OF_A_SECOND_CALL / (max(0.0, arrival - projection) + copy)
    return True if query.shape[0] * ceil_div(call.key_shards.total, call.group.size) < limit else False
