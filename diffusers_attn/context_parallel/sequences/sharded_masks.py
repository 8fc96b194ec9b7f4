"""The masks of a call whose queries and keys are shards, told apart by what they say rather than by their shape.

A rank that holds all tokens of a short sequence could mistake a split mask for a whole one, and then the ranks would
no longer do the same. So whoever makes the call says which it is; `sharded_mask` does where shapes allow no mistake.
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
    """Rows by blocks: which blocks of the keys of all ranks each block of this rank's queries sees, in the order of the
    sequence: `[batch | 1, heads | 1, this rank's blocks of queries, all blocks of keys]`, bool. Every rank holds whole
    blocks. A provider that takes a `BlockMask` is given one; others, the same mask for every token."""

    values: Tensor
    block: int
    """tokens of a block, of queries as of keys."""


class OuterMask(NamedTuple):
    """What queries and keys say separately, both split like their tokens: `[batch | 1, this rank's queries]` and
    `[batch | 1, this rank's keys]`. Bool: a pair takes part where both do. Floating: their product is added."""

    query: Tensor
    key: Tensor


class RectangleMask(NamedTuple):
    """Which runs of all queries see which runs of all keys, in the order of the sequences; alike for all samples and
    heads, and no pair in two of them. Queries that are in none see nothing: their output is zero."""

    rectangles: tuple[Rectangle, ...]


ShardedMask = KeyMask | RowMask | BlockRowMask | OuterMask | RectangleMask


def sharded_mask(
    mask: Tensor, query_shards: Shards, key_shards: Shards, rank: int, given: tuple[int, ...] | None = None
) -> KeyMask | RowMask:
    """What a 4-D mask of a model means (`[batch | 1, heads | 1, queries | 1, keys]`), by its lengths.

    A mask over this rank's keys that has no rows is a key mask; one over all keys is the rows of this rank's queries or
    of all, or, without rows, a key mask that is still whole.

    Args:
        given: the shape that an error is to name, where the mask had another before.

    Raises:
        AttentionProviderError: lengths that are none of these; or with which some rank could not tell. Then all refuse.
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
        f"key mask, split like the keys), [batch, 1, 1, {key_shards.total}] (a whole one) and [batch, heads, "
        f"{query_shards.total} or {queries} or 1, {key_shards.total}] (all rows or this rank's, all keys). A mask "
        "that a block makes from one value per token is an outer product of local values; its plan has to say so."
    )
