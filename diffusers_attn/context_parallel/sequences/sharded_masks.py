"""The masks of calls over shards: a type for each meaning.

A shape does not always tell the meaning. A rank that holds all tokens of a short sequence could mistake a split mask
for a full one, and the ranks would diverge. So the caller chooses the type. `sharded_mask` chooses it by the shape, and
refuses shapes that are ambiguous on any rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...errors import AttentionProviderError
from .rectangles import Rectangle
from .sharding import Shards, take


class KeyMask(NamedTuple):
    """One value per key, split like the keys: `[batch | 1, this rank's keys]`, bool or additive."""

    values: Tensor


class RowMask(NamedTuple):
    """The rows of this rank's queries over the keys of all ranks, in the order of the sequence:
    `[batch | 1, heads | 1, this rank's queries, all keys]`, bool or additive."""

    values: Tensor


class BlockRowMask(NamedTuple):
    """Rows by blocks: whether each block of this rank's queries attends to each block of keys of all ranks, in the
    order of the sequence: `[batch | 1, heads | 1, this rank's blocks of queries, all blocks of keys]`, bool. Every rank
    holds full blocks. A provider that accepts a `BlockMask` receives one; others receive the mask for every token."""

    values: Tensor
    block: int
    """Tokens per block, of queries as of keys."""


class OuterMask(NamedTuple):
    """One value per query and one per key, split like their tokens: `[batch | 1, this rank's queries]` and
    `[batch | 1, this rank's keys]`. Bool: a pair takes part if both values are True. Floating: their product is added
    to the score."""

    query: Tensor
    key: Tensor


class RectangleMask(NamedTuple):
    """Spans of queries and the spans of keys that they attend to, in the order of the full sequences, the same for all
    samples and heads. No pair may be in two rectangles. Queries in no rectangle have an output of zero."""

    rectangles: tuple[Rectangle, ...]


ShardedMask = KeyMask | RowMask | BlockRowMask | OuterMask | RectangleMask


def sharded_mask(
    mask: Tensor, query_shards: Shards, key_shards: Shards, rank: int, given: tuple[int, ...] | None = None
) -> KeyMask | RowMask:
    """Finds the meaning of a model's mask by its lengths.

    A mask with a single row over this rank's keys is a key mask. A mask over all keys has the rows of this rank's
    queries, or of all queries, or a single row: then it is a key mask that is not split.

    Args:
        mask: `[batch | 1, heads | 1, queries | 1, keys]`.
        given: the mask's shape for errors, if the caller has changed it.

    Raises:
        AttentionProviderError: the lengths fit none of these, or more than one on some rank. On all ranks.
    """
    queries, keys = query_shards.sizes[rank], key_shards.sizes[rank]
    if key_shards.total in key_shards.sizes or 1 in query_shards.sizes:
        raise AttentionProviderError(
            f"with {query_shards.sizes} queries and {key_shards.sizes} keys on the ranks, a mask's shape does not tell "
            "every rank what it means. Use fewer ranks for sequences as short as this, or call parallel_attention with "
            "a KeyMask, RowMask or OuterMask."
        )
    rowless = mask.shape[2] == 1
    if mask.shape[-1] == keys and rowless and mask.shape[1] == 1:
        return KeyMask(mask[:, 0, 0])
    if mask.shape[-1] == key_shards.total and rowless and mask.shape[1] == 1:
        return KeyMask(take(mask[:, 0, 0], key_shards.spans[rank], dim=1))
    if mask.shape[-1] == key_shards.total and (rowless or mask.shape[2] == queries):
        return RowMask(mask.expand(-1, -1, queries, -1))
    if mask.shape[-1] == key_shards.total and mask.shape[2] == query_shards.total:
        return RowMask(take(mask, query_shards.spans[rank], dim=2))
    raise AttentionProviderError(
        f"attn_mask has shape {list(mask.shape if given is None else given)} on rank {rank}, which holds {queries} of "
        f"{query_shards.total} queries and {keys} of {key_shards.total} keys. Accepted are [batch, 1, 1, {keys}] (a "
        f"key mask, split like the keys), [batch, 1, 1, {key_shards.total}] (for all keys) and [batch, heads, "
        f"{query_shards.total} or {queries} or 1, {key_shards.total}] (all rows or this rank's, all keys). If a block "
        "makes the mask from one value per token, an outer product, declare that in the plan: "
        "CPAttention(..., outer_mask=True)."
    )
