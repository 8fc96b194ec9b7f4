"""Checks of a call over several ranks, before anything is sent."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ...tracing.symbolic import constant
from ..mesh import ContextParallelMesh
from ..sequences.sharded_masks import BlockRowMask, KeyMask, OuterMask, RectangleMask, RowMask, ShardedMask
from ..sequences.sharding import Shards


def check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ShardedMask | None,
    mesh: ContextParallelMesh,
    query_shards: Shards,
    key_shards: Shards,
) -> None:
    """Raises AttentionProviderError if a tensor does not have the size of its shard."""
    if not len(query_shards.spans) == len(key_shards.spans) == mesh.size:
        raise AttentionProviderError(
            f"query_shards is for {len(query_shards.spans)} ranks and key_shards for {len(key_shards.spans)}, but the "
            f"mesh has {mesh.size} ranks. Make both for mesh.size ranks."
        )
    queries, keys = query_shards.sizes[mesh.rank], key_shards.sizes[mesh.rank]
    wanted: list[tuple[str, Tensor, int, int]] = [
        ("query", query, 1, queries), ("key", key, 1, keys), ("value", value, 1, keys)
    ]  # fmt: skip
    if isinstance(mask, KeyMask):
        wanted += [("mask", mask.values, 1, keys)]
    elif isinstance(mask, RowMask):
        wanted += [("mask", mask.values, 2, queries), ("mask", mask.values, 3, key_shards.total)]
    elif isinstance(mask, BlockRowMask):
        _check_blocks(mask, mesh, query_shards, key_shards)
    elif isinstance(mask, RectangleMask):
        _check_rectangles(mask, query_shards, key_shards)
    elif isinstance(mask, OuterMask):
        wanted += [("query's mask", mask.query, 1, queries), ("key's mask", mask.key, 1, keys)]
    for name, tensor, dim, size in wanted:
        if tensor.shape[dim] != size:
            raise AttentionProviderError(
                f"{name} {list(tensor.shape)} has {tensor.shape[dim]} in dimension {dim}; its shards say {size} for "
                f"rank {mesh.rank} (queries {query_shards.sizes}, keys {key_shards.sizes}). Tensors are [batch, local "
                "tokens, heads, head_dim]."
            )
    if constant(query.shape[2]) % constant(key.shape[2]):
        raise AttentionProviderError(
            f"got {query.shape[2]} query heads and {key.shape[2]} key heads; the number of query heads must be a "
            "multiple of the number of key heads."
        )
    if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in mask or ()) and torch.is_grad_enabled():
        raise AttentionProviderError(
            "the mask requires a gradient, but context parallelism computes no gradients of masks. Detach the mask, or "
            "train it on one device."
        )


def _check_blocks(mask: BlockRowMask, mesh: ContextParallelMesh, query_shards: Shards, key_shards: Shards) -> None:
    """Raises AttentionProviderError if a rank holds a part of a block, or the mask does not have this rank's sizes."""
    spans = [span for shards in (query_shards, key_shards) for each in shards.spans for span in each]
    found, wanted = list(mask.values.shape[2:]), [query_shards.sizes[mesh.rank], key_shards.total]
    if any(start % mask.block or length % mask.block for start, length in spans):
        raise AttentionProviderError(
            f"the mask has blocks of {mask.block} tokens, but the ranks have {query_shards.sizes} queries and "
            f"{key_shards.sizes} keys, which are not complete blocks. Split the sequence between blocks with "
            f"advanced.CPBlocks(sequence, {mask.block}) in its plan."
        )
    if mask.values.dtype != torch.bool or [size * mask.block for size in found] != wanted:
        raise AttentionProviderError(
            f"the mask by blocks of {mask.block} tokens is {mask.values.dtype} {list(mask.values.shape)} on rank "
            f"{mesh.rank}; bool [batch, heads, {wanted[0] // mask.block}, {wanted[1] // mask.block}] is accepted, for "
            f"this rank's {wanted[0]} queries and all {wanted[1]} keys."
        )


def _check_rectangles(mask: RectangleMask, query_shards: Shards, key_shards: Shards) -> None:
    """Raises AttentionProviderError if a rectangle reaches past the queries or keys."""
    for rectangle in mask.rectangles:
        for (start, length), total in zip(rectangle, (query_shards.total, key_shards.total)):
            if start < 0 or length < 0 or start + length > total:
                raise AttentionProviderError(
                    f"the mask has {rectangle}, but there are {query_shards.total} queries and {key_shards.total} "
                    "keys. Spans are (start, length) in the full sequences of all ranks."
                )


def check_causality(is_causal: bool, mask: ShardedMask | None) -> None:
    """Raises AttentionProviderError if causality would cut through parts of the mask."""
    if is_causal and isinstance(mask, (BlockRowMask, RectangleMask)):
        raise AttentionProviderError(
            "is_causal cannot be combined with a mask of blocks or rectangles, since causality would cut through those "
            "on the diagonal. Pass a RowMask that contains both."
        )


def check_full_sequence(
    by_place: tuple[str, ...],
    mask: ShardedMask | None,
    mesh: ContextParallelMesh,
    query_shards: Shards,
    key_shards: Shards,
) -> None:
    """Raises AttentionProviderError if a kernel whose options count positions would receive a part of the sequence."""
    if mesh.ring.size > 1:
        raise AttentionProviderError(
            f"{', '.join(by_place)} counts positions of the full sequence, but over a ring (ring_degree="
            f"{mesh.ring.size}) the kernel receives parts of it. Set ulysses_degree={mesh.size} and ring_degree=1, so "
            "that the kernel receives the full sequence, or leave the option out."
        )
    if query_shards.total != key_shards.total or mask is not None:
        raise AttentionProviderError(
            f"{', '.join(by_place)} counts positions: it is accepted with a query and a key of equal lengths and no "
            f"mask. This call has {query_shards.total} queries and {key_shards.total} keys"
            f"{'' if mask is None else ', and a mask'}. Leave the option out."
        )
