"""Causal attention between pieces of a sequence, as calls that kernels know: everything visible, or square and causal.

Which key a query sees depends on their places in the whole sequence. Between two spans the visible keys are a
trapezoid, and any trapezoid is at most two rectangles and a triangle, so that no mask is ever made.
"""

from __future__ import annotations

from typing import NamedTuple

from ...tracing.symbolic import equal, sort
from .sharding import Span


class Tile(NamedTuple):
    """Some of the queries at hand attending to some of the keys at hand. Spans count from the first token at hand."""

    query: Span
    key: Span
    is_causal: bool = False


def tiles(query_spans: tuple[Span, ...], key_spans: tuple[Span, ...], is_causal: bool) -> list[Tile]:
    """The calls that together let these queries see all that they may of these keys, each pair once."""
    queries, keys = (sum(length for _, length in spans) for spans in (query_spans, key_spans))
    if queries == 0 or keys == 0:
        return []
    if not is_causal:
        return [Tile((0, queries), (0, keys))]
    if equal(query_spans, key_spans) and equal(query_spans, tuple(sort(query_spans))):
        return [Tile((0, queries), (0, keys), True)]
    found = [
        tile
        for query, query_offset in with_offsets(query_spans)
        for key, key_offset in with_offsets(key_spans)
        for tile in _between(query, key, query_offset, key_offset)
    ]
    return merge_queries(merge_keys(found))


def with_offsets(spans: tuple[Span, ...]) -> list[tuple[Span, int]]:
    """Each span, with the place of its first token among those at hand."""
    return [(span, sum(length for _, length in spans[:index])) for index, span in enumerate(spans)]


def _between(query: Span, key: Span, query_offset: int, key_offset: int) -> list[Tile]:
    (query_start, query_len), (key_start, key_len) = query, key
    query_end, key_end = query_start + query_len, key_start + key_len
    before = min(key_end, query_start)  # keys up to here are seen by every query
    corner = max(query_start, key_start)
    square = min(query_end, key_end) - corner

    def tile(query_from: int, query_to: int, key_from: int, key_to: int, is_causal: bool = False) -> list[Tile]:
        if query_to <= query_from or key_to <= key_from:
            return []
        rows = (query_from - query_start + query_offset, query_to - query_from)
        return [Tile(rows, (key_from - key_start + key_offset, key_to - key_from), is_causal)]

    found = tile(query_start, query_end, key_start, before)
    if square > 0:
        found += tile(corner, corner + square, corner, corner + square, True)
        found += tile(corner + square, query_end, corner, corner + square)
    return found


def merge_keys(found: list[Tile]) -> list[Tile]:
    """Fewer calls: the same queries, neighbouring keys."""
    merged: list[Tile] = []
    for tile in sort(found, key=lambda tile: (tile.is_causal, tile.query, tile.key)):
        last = merged[-1] if merged else None
        if (
            last
            and not (tile.is_causal or last.is_causal)
            and equal(last.query, tile.query)
            and sum(last.key) == tile.key[0]
        ):
            merged[-1] = Tile(tile.query, (last.key[0], last.key[1] + tile.key[1]))
        else:
            merged.append(tile)
    return merged


def merge_queries(found: list[Tile]) -> list[Tile]:
    """Fewer calls: the same keys, neighbouring queries."""
    merged: list[Tile] = []
    for tile in sort(found, key=lambda tile: (tile.is_causal, tile.key, tile.query)):
        last = merged[-1] if merged else None
        if (
            last
            and not (tile.is_causal or last.is_causal)
            and equal(last.key, tile.key)
            and sum(last.query) == tile.query[0]
        ):
            merged[-1] = Tile((last.query[0], last.query[1] + tile.query[1]), tile.key)
        else:
            merged.append(tile)
    return merged
