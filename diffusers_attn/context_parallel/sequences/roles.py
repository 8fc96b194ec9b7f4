"""Which sequences an attention module, and one attention call, attend to."""

from __future__ import annotations

from typing import NamedTuple

from .sharding import Shards


class Role(NamedTuple):
    """The sequences of an attention module, from `CPAttention` in a plan."""

    query: tuple[str, ...]
    """Sequences of the queries, in the order in which they are joined."""
    key: tuple[str, ...]
    """Sequences of the keys. Empty if every rank has all keys."""
    outer_mask: bool = False
    """Whether the mask is an outer product of one value per token, made from split tokens."""
    key_mask: bool = False
    """Whether the mask has one value for each key of the full sequence, the same for all heads and queries. Padding
    behind the last key is cut off."""
    row_mask: bool = False
    """Whether the mask has a row for each query of this rank and a column for each key of the full sequence, the same
    for all heads. Padding behind the last key is cut off."""
    prefix: str | None = None
    """Sequence, or name of a cache, whose keys come before those of `key` and are replicated."""


REPLICATED = Role((), ())
"""The role of a module that has all tokens of everything it attends to."""


class SplitCall(NamedTuple):
    """An attention call over the tokens of all ranks."""

    queries: Shards
    keys: Shards
    in_order: bool
    """Whether the order of joined sequences is known, and with it the position of every token."""
