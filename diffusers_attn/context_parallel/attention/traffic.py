"""What a call over several ranks sends, for the log: one message for each kind of call."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ...tracing.symbolic import constant
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
_TOKENS = 1000
"""Tokens per rank, of one sample, for which a graph's message states the bytes: a graph may serve any length."""
Place = tuple[int, int]
"""Rank in a group, and size of the group."""
_noted: set[tuple[object, ...]] = set()


def strategy_in_words(mesh: ContextParallelMesh, strategy: str) -> str:
    """A short name with the degrees, such as "ulysses 2 x gather 4".

    Args:
        strategy: name in `STRATEGIES`.
    """
    over_ring = {"allgather_kv": "gather", "allgather_kv_one_call": "gather in one call"}.get(strategy, "ring")
    degrees = ("ulysses", mesh.ulysses.size), (over_ring, mesh.ring.size)
    return " x ".join(f"{name} {size}" for name, size in degrees if size > 1)


def note(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: BlockAttention,
    mesh: ContextParallelMesh,
    strategy: str,
    provider: str,
) -> None:
    """Logs how a call is computed, once for each kind of call.

    Args:
        query, key, value: this rank's, `[batch, local tokens, heads, head_dim]`.
        strategy: name in `STRATEGIES`, for the ring.
        provider: name of the provider that serves the call.
    """
    heads = constant(query.shape[2]), constant(key.shape[2]), constant(query.shape[3]), constant(value.shape[3])
    places = (mesh.ulysses.rank, mesh.ulysses.size), (mesh.ring.rank, mesh.ring.size)
    fixed = provider, call.transport, call.kernel.needs_grad, strategy, query.dtype, heads, *places
    if torch.compiler.is_compiling():
        _note(*fixed, None)
    else:
        _note(*fixed, (query.shape[0], call.query_shards.sizes, call.key_shards.sizes))


# A graph contains no message: Dynamo calls this while it traces.
@torch._dynamo.assume_constant_result
def _note(
    provider: str,
    transport: str,
    needs_grad: bool,
    strategy: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int, int],
    ulysses: Place,
    ring: Place,
    sizes: tuple[int, tuple[int, ...], tuple[int, ...]] | None,
) -> None:
    kind = provider, transport, needs_grad, strategy, dtype, heads, ulysses, ring, sizes
    if kind in _noted:
        return
    _noted.add(kind)
    ranks, rank = ulysses[1] * ring[1], ring[0] * ulysses[1] + ulysses[0]
    if sizes is None:
        batch, queries, keys = 1, (_TOKENS,) * ranks, (_TOKENS,) * ranks
        lengths, unit = "any length, in a compiled graph", f" for each {_TOKENS:,} of its tokens"
    else:
        batch, queries, keys = sizes
        lengths = f"batch {batch}, {queries[rank]:,} queries and {keys[rank]:,} of {sum(keys):,} keys on this rank"
        unit = " in the forward" if needs_grad else ""
    sent = numbers_sent(heads, ulysses, ring, strategy == "ring" and transport == COLLECTIVE, queries, keys)
    log.debug(
        "attention over %d ranks by %s: ulysses_degree=%d, ring_degree=%d (%s); %s; %d query and %d key heads of %d, "
        "%s; this rank sends %s bytes%s (transport: %s)",
        ranks, provider, ulysses[1], ring[1], STRATEGIES[strategy], lengths, *heads[:3],
        str(dtype).removeprefix("torch."), f"{batch * sent * dtype.itemsize:,}", unit, transport,
    )  # fmt: skip


def numbers_sent(
    heads: tuple[int, int, int, int],
    ulysses: Place,
    ring: Place,
    passes_on: bool,
    queries: Sequence[int],
    keys: Sequence[int],
) -> int:
    """Numbers of queries, keys, values and outputs that a rank sends to others for one sample, in a forward. Masks are
    not counted.

    Args:
        heads: numbers of query heads and key heads, head_dim of the query, and of the value.
        passes_on: whether a rank of the ring sends what it received in the step before, and not always its own keys.
        queries, keys: numbers of tokens of all ranks.
    """
    (all_heads, all_kv_heads, head_dim, value_head_dim), (rank, size) = heads, ulysses
    own_heads, own_kv_heads, repeats = split_heads(all_heads, all_kv_heads, size)
    own, own_kv = own_heads[rank], own_kv_heads[rank]
    in_group = slice(ring[0] * size, (ring[0] + 1) * size)
    local_queries, local_keys = queries[in_group][rank], keys[in_group][rank]
    sent = local_queries * (all_heads - own) * head_dim
    sent += local_keys * (all_kv_heads * repeats - own_kv) * (head_dim + value_head_dim)
    sent += (sum(queries[in_group]) - local_queries) * own * value_head_dim  # the outputs, back to their ranks
    of_ring = [sum(keys[start : start + size]) for start in range(0, len(keys), size)]
    rows = sum(of_ring[(ring[0] - step) % ring[1] if passes_on else ring[0]] for step in range(ring[1] - 1))
    return sent + rows * own_kv * (head_dim + value_head_dim)
