"""Causal attention between parts of a sequence, as calls that kernels support: without a mask, or square and causal.

Which keys a query attends to depends on their positions in the full sequence. Between two spans, the visible pairs are
a trapezoid. A trapezoid is at most two rectangles and a triangle, so that no mask is needed.
"""

from __future__ import annotations

from typing import NamedTuple

from ...tracing.symbolic import equal, sort
from .sharding import Span


class Tile(NamedTuple):
    """One call: some of the given queries attend to some of the given keys. Spans count from the first given token."""

    query: Span
    key: Span
    is_causal: bool = False


def tiles(query_spans: tuple[Span, ...], key_spans: tuple[Span, ...], is_causal: bool) -> list[Tile]:
    """The calls that together compute the attention between these queries and keys, each visible pair once.

    Args:
        query_spans, key_spans: positions of the given queries and keys in the full sequence.
    """
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
    """Each span, with the number of given tokens before it."""
    return [(span, sum(length for _, length in spans[:index])) for index, span in enumerate(spans)]


def _between(query: Span, key: Span, query_offset: int, key_offset: int) -> list[Tile]:
    (query_start, query_len), (key_start, key_len) = query, key
    query_end, key_end = query_start + query_len, key_start + key_len
    before = min(key_end, query_start)  # every query attends to the keys up to here
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
    """Merges calls with the same queries and adjacent keys."""
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
    """Merges calls with the same keys and adjacent queries."""
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
