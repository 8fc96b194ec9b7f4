"""Masks made of rectangles: a span of queries attends to all of a span of keys, in a call without a mask.

So no mask is made, no masked pair is computed, and every kernel that returns its log-sum-exp can be used.
"""

from __future__ import annotations

from typing import NamedTuple

from .causal_tiles import Tile, merge_keys, merge_queries, with_offsets
from .sharding import Span


class Rectangle(NamedTuple):
    """These queries attend to all of these keys. Positions are those in the full sequences."""

    query: Span
    key: Span


def tiles_within(
    rectangles: tuple[Rectangle, ...], query_spans: tuple[Span, ...], key_spans: tuple[Span, ...]
) -> list[Tile]:
    """The calls that together compute the attention between these queries and keys.

    Args:
        rectangles: the visible pairs. No pair may be in two of them.
        query_spans, key_spans: positions of the given queries and keys in the full sequences.
    """
    found = []
    for seen in rectangles:
        queries = [_common(span, seen.query, offset) for span, offset in with_offsets(query_spans)]
        keys = [_common(span, seen.key, offset) for span, offset in with_offsets(key_spans)]
        found += [Tile(query, key) for query in queries for key in keys if query[1] > 0 and key[1] > 0]
    return merge_queries(merge_keys(found))


def _common(span: Span, other: Span, offset: int) -> Span:
    """The overlap of both spans, counted from the start of `span`, which lies at `offset`. A length below 0 means that
    they do not overlap."""
    start = max(span[0], other[0])
    return start - span[0] + offset, min(sum(span), sum(other)) - start
