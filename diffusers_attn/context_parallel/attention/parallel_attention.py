"""One call on any mesh: heads are exchanged along `ulysses`, keys and values along `ring` (USP, arXiv 2405.07719).

A rank holds shard `ring.rank * ulysses.size + ulysses.rank`. The ranks that exchange heads therefore hold neighbouring
shards, which together are one shard of the ring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import spans
from ...logs import debugging
from ...masks import MaskKind
from ..comm import collectives
from ..comm.transport import COLLECTIVE
from ..mesh import ContextParallelMesh
from ..sequences.sharded_masks import BlockRowMask, KeyMask, OuterMask, RectangleMask, RowMask, ShardedMask
from ..sequences.sharding import Shards, gather, in_blocks, in_order, out_of_order, take
from .allgather_kv import allgather_kv_attention
from .allgather_kv_one_call import allgather_kv_one_call_attention, is_faster
from .block_attention import BlockAttention
from .call_checks import check_causality, check_full_sequence, check_shapes
from .partial_kernel import PartialKernel, options_by_place
from .ring import ring_attention
from .traffic import note, strategy_in_words
from .ulysses import ulysses_attention

STRATEGIES: dict[str, Callable[..., Tensor]] = {}
"""Attention over the ring, by name. Each is called with (query, key, value, key_mask, rows, call)."""
_OF_ROTATE_METHOD = {"alltoall": "ring", "allgather": "allgather_kv"}


def parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ShardedMask | None = None,
    *,
    mesh: ContextParallelMesh,
    query_shards: Shards,
    key_shards: Shards,
    provider: str = "native",
    options: tuple[tuple[str, object], ...] = (),
    is_causal: bool = False,
    scale: float | None = None,
    transport: str = COLLECTIVE,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks, as one process would compute it.

    Args:
        query: `[batch, local queries, heads, head_dim]`.
        key: `[batch, local keys, kv_heads, head_dim]`.
        value: `[batch, local keys, kv_heads, value_head_dim]`.
        mask: mask of the local queries over all keys.
        query_shards, key_shards: which rank holds which tokens; equal on every rank.
        provider, options: name of the kernel's provider, and its options.
        is_causal: whether a query sees only the keys up to its own position in the full sequence.
        scale: factor of the scores; default `head_dim ** -0.5`.
        transport: kind of the `Transport` that `choose_transport` chose for the mesh. The memory that it returned
            with the transport must still be alive.

    Returns:
        `[batch, local queries, heads, value_head_dim]`.

    Raises:
        AttentionProviderError: the shapes do not match the shards, or the provider does not serve the call or, for a
            ring, has no log-sum-exp. Raised before anything is sent.
    """
    check_shapes(query, key, value, mask, mesh, query_shards, key_shards)
    check_causality(is_causal, mask)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    block = mask.block if isinstance(mask, BlockRowMask) else 1
    by_place = options_by_place(provider, options) if options else ()
    if by_place:
        check_full_sequence(by_place, mask, mesh, query_shards, key_shards)
    kernel = PartialKernel(provider, options, scale, needs_grad, block, by_place)
    kind = kernel.block_kind if isinstance(mask, BlockRowMask) else _kind(mask)
    seen = mask.rectangles if isinstance(mask, RectangleMask) else None
    server = kernel.check(query, key, value, kind, is_causal, partial=mesh.ring.size > 1 or seen is not None)
    key_mask, rows, dead_queries = _reduce_mask(mask, mesh, key_shards)
    call = BlockAttention(
        kernel, mesh.ring, query_shards, key_shards, is_causal, mesh.config.convert_to_fp32, transport, seen
    )
    if debugging():
        note(query, key, value, call, mesh, _strategy(query, key, value, call, mesh), server)
    over_ranks = _over_ring if mesh.ulysses.size == 1 else _over_ulysses_and_ring
    if spans.is_on():
        strategy = _strategy(query, key, value, call, mesh)
        over_ranks = spans.within(over_ranks, spans.ATTENTION, server, strategy_in_words(mesh, strategy))
    out = over_ranks(query, key, value, key_mask, rows, call, mesh)
    return out if dead_queries is None else out.masked_fill(dead_queries[:, :, None, None], 0.0)


def _over_ulysses_and_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
    mesh: ContextParallelMesh,
) -> Tensor:
    """Exchanges tokens for heads, then attends over the ring with the exchanged tensors."""
    group = mesh.ulysses
    in_group = slice(mesh.ring.rank * group.size, (mesh.ring.rank + 1) * group.size)
    query_sizes, key_sizes = call.query_shards.sizes[in_group], call.key_shards.sizes[in_group]
    if key_mask is not None:
        key_mask = _gather_rows(key_mask, 1, key_sizes, mesh)
    if rows is not None:
        rows = _gather_rows(rows, 2, tuple(size // call.kernel.block for size in query_sizes), mesh)
    query_shards, key_shards = call.query_shards.merged(group.size), call.key_shards.merged(group.size)
    query_spans, key_spans = query_shards.spans[mesh.ring.rank], key_shards.spans[mesh.ring.rank]
    # Only these depend on the order of tokens. Sorted tokens need the fewest calls: one, for causality without a ring.
    ordered = call.is_causal or call.seen is not None or bool(call.kernel.by_place)
    if ordered:
        query_shards, key_shards = query_shards.sorted(), key_shards.sorted()
        key_mask = None if key_mask is None else in_order(key_mask, key_spans, 1)
        rows = None if rows is None else in_order(rows, query_spans, 2)
    merged = call._replace(query_shards=query_shards, key_shards=key_shards)

    def attention(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
        own_rows = rows if rows is None or rows.shape[1] == 1 else rows.narrow(1, first_head, query.shape[2])
        if not ordered:
            return _over_ring(query, key, value, key_mask, own_rows, merged, mesh)
        query, key, value = in_order(query, query_spans, 1), in_order(key, key_spans, 1), in_order(value, key_spans, 1)
        return out_of_order(_over_ring(query, key, value, key_mask, own_rows, merged, mesh), query_spans, 1)

    return ulysses_attention(query, key, value, group, query_sizes, key_sizes, attention)


def _over_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    rows: Tensor | None,
    call: BlockAttention,
    mesh: ContextParallelMesh,
) -> Tensor:
    """Attends over the ring with the strategy for this call."""
    return STRATEGIES[_strategy(query, key, value, call, mesh)](query, key, value, key_mask, rows, call)


def _strategy(query: Tensor, key: Tensor, value: Tensor, call: BlockAttention, mesh: ContextParallelMesh) -> str:
    """The name of the strategy in `STRATEGIES`."""
    method, size = mesh.config.rotate_method, mesh.ring.size
    if size == 1:
        # Rectangles need several calls of the kernel, whose results a ring of one rank merges.
        return "one_rank" if call.seen is None else "ring"
    # With Ulysses, queries arrive together with keys, so nothing is computed under a gather. With two ranks, a ring
    # exchanges the same as a gather.
    gathers = mesh.ulysses.size == 1 and (method == "allgather" or size == 2)
    if gathers and is_faster(query, key, value, call):
        return "allgather_kv_one_call"
    return _OF_ROTATE_METHOD[method]


def _one_rank(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, rows: Tensor | None, call: BlockAttention
) -> Tensor:
    """The kernel's own attention, for a ring of one rank."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if rows is not None:
        mask = take(rows, in_blocks(call.key_shards.spans[0], call.kernel.block), dim=-1)
    return call.kernel.attention(query, key, value, mask, call.is_causal)


STRATEGIES.update(
    one_rank=_one_rank,
    ring=ring_attention,
    allgather_kv=allgather_kv_attention,
    allgather_kv_one_call=allgather_kv_one_call_attention,
)


def _kind(mask: ShardedMask | None) -> MaskKind:
    """The kind of mask that the kernel has to apply."""
    if mask is None or isinstance(mask, RectangleMask):
        return MaskKind.NONE
    if isinstance(mask, OuterMask):
        return MaskKind.KEY if mask.key.dtype == torch.bool else MaskKind.BIAS
    if isinstance(mask, KeyMask):
        return MaskKind.KEY if mask.values.dtype == torch.bool else MaskKind.KEY_BIAS
    return MaskKind.DENSE if mask.values.dtype == torch.bool else MaskKind.BIAS


def _reduce_mask(
    mask: ShardedMask | None, mesh: ContextParallelMesh, key_shards: Shards
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The mask as a key mask or as rows, the two forms that strategies take, and the queries that see no key."""
    if mask is None or isinstance(mask, RectangleMask):
        return None, None, None
    if isinstance(mask, KeyMask):
        return mask.values, None, None
    if isinstance(mask, (RowMask, BlockRowMask)):
        return None, mask.values, None
    if mask.key.dtype == torch.bool:
        return mask.key, None, ~mask.query
    keys = gather(mask.key, key_shards, 1, mesh)
    return None, mask.query[:, None, :, None] * keys[:, None, None, :], None


def _gather_rows(mask: Tensor, dim: int, sizes: tuple[int, ...], mesh: ContextParallelMesh) -> Tensor:
    """The parts of a mask along `dim` from all ranks that exchange heads, concatenated."""
    gathered = collectives.start_gather(mask.movedim(dim, 0), sizes, mesh.ulysses)
    return collectives.wait(gathered, mesh.ulysses).movedim(0, dim)
