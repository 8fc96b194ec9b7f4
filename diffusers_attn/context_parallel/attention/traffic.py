"""What a call over several ranks sends, for the log: one message for each kind of call."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ...tracing.symbolic import constant
from ..comm.group import Group
from ..comm.transport import COLLECTIVE
from ..mesh import ContextParallelMesh
from .block_attention import BlockAttention
from .ulysses import split_heads

log = logging.getLogger(__name__)
STRATEGIES = {
    "one_rank": "every rank attends to the full sequence with its heads",
    "ring": "keys and values pass from rank to rank",
    "allgather_kv": "keys and values of other ranks arrive during the attention to the local ones",
    "allgather_kv_one_call": "keys and values of all ranks are gathered first, which is predicted to be faster here",
}
"""The strategies of `parallel_attention`, in words."""
_noted: set[tuple[object, ...]] = set()


def note(
    query: Tensor, key: Tensor, value: Tensor, call: BlockAttention, mesh: ContextParallelMesh, strategy: str
) -> None:
    """Logs how a call is computed, once for each kind of call.

    Args:
        query, key, value: this rank's, `[batch, local tokens, heads, head_dim]`.
        strategy: name in `STRATEGIES`, for the ring.
    """
    heads = constant(query.shape[2]), constant(key.shape[2]), constant(query.shape[3]), constant(value.shape[3])
    fixed = call.kernel.provider, strategy, mesh.ulysses.size, mesh.ring.size, call.transport, heads, query.dtype
    sizes = query.shape[0], query.shape[1], key.shape[1], call.key_shards.total
    if any(isinstance(size, torch.SymInt) for size in sizes):  # a compiled graph for any length
        _note(*fixed, None, None)
        return
    sent = bytes_sent(query, key, value, call, mesh, strategy)
    _note(*fixed, sizes, (sent, call.kernel.needs_grad))


@torch._dynamo.assume_constant_result
def _note(
    provider: str,
    strategy: str,
    ulysses: int,
    ring: int,
    transport: str,
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int] | None,
    sent: tuple[int, bool] | None,
) -> None:
    kind = provider, strategy, ulysses, ring, transport, heads, dtype, sizes, sent
    if kind in _noted:
        return
    _noted.add(kind)
    lengths, traffic = "any length", "bytes depend on the length"
    if sizes is not None and sent is not None:
        batch, queries, keys, total = sizes
        lengths = f"batch {batch}, {queries:,} queries and {keys:,} of {total:,} keys on this rank"
        traffic = f"this rank sends {sent[0]:,} bytes" + (" in the forward" if sent[1] else "")
    log.debug(
        "attention over %d ranks by %s: ulysses_degree=%d, ring_degree=%d (%s); %s; %d query and %d key heads of %d, "
        "%s; %s (transport: %s)",
        ulysses * ring, provider, ulysses, ring, STRATEGIES[strategy], lengths, *heads[:3],
        str(dtype).removeprefix("torch."), traffic, transport,
    )  # fmt: skip


def bytes_sent(
    query: Tensor, key: Tensor, value: Tensor, call: BlockAttention, mesh: ContextParallelMesh, strategy: str
) -> int:
    """Bytes of queries, keys, values and outputs that this rank sends to others in a forward; masks are not counted.

    Args:
        query, key, value: this rank's, `[batch, local tokens, heads, head_dim]`.
        strategy: name in `STRATEGIES`.
    """
    batch, itemsize, head_dim, value_head_dim = query.shape[0], query.element_size(), query.shape[3], value.shape[3]
    group, ring = mesh.ulysses, mesh.ring
    heads, kv_heads, repeats = split_heads(query.shape[2], key.shape[2], group.size)
    own_heads, own_kv_heads = heads[group.rank], kv_heads[group.rank]
    neighbours = slice(ring.rank * group.size, (ring.rank + 1) * group.size)
    queries, keys = call.query_shards.sizes[neighbours], call.key_shards.sizes[neighbours]
    of_key = key.shape[2] * repeats - own_kv_heads
    numbers = queries[group.rank] * (query.shape[2] - own_heads) * head_dim
    numbers += keys[group.rank] * of_key * (key.shape[3] + value_head_dim)
    numbers += (sum(queries) - queries[group.rank]) * own_heads * value_head_dim  # the outputs, back to their ranks
    rows = _rows_sent(call.key_shards.merged(group.size).sizes, ring, strategy, call.transport)
    numbers += rows * own_kv_heads * (key.shape[3] + value_head_dim)
    return batch * numbers * itemsize


def _rows_sent(sizes: Sequence[int], ring: Group, strategy: str, transport: str) -> int:
    """The number of keys that this rank sends to others, `sizes` being the numbers of keys of the ranks of the ring."""
    steps = range(ring.size - 1)
    passes_on = strategy == "ring" and transport == COLLECTIVE
    return sum(sizes[(ring.rank - step) % ring.size if passes_on else ring.rank] for step in steps)
