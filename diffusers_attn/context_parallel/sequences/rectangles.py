"""Masks made of rectangles: a span of queries sees all of a span of keys. Each rectangle is a call without a mask.

So no mask is ever made, what nobody sees is never computed, and any kernel that gives its log-sum-exp serves.
"""

from __future__ import annotations

from typing import NamedTuple

from .causal_tiles import Tile, merge_keys, merge_queries, with_offsets
from .sharding import Span


class Rectangle(NamedTuple):
    """These queries see these keys, all of them. Places are those of the whole sequences."""

    query: Span
    key: Span


def tiles_within(
    rectangles: tuple[Rectangle, ...], query_spans: tuple[Span, ...], key_spans: tuple[Span, ...]
) -> list[Tile]:
    """The calls that together let these queries see what `rectangles`, no two of which share a pair, let them see of
    these keys."""
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
