"""Predicts the time of attention under context parallelism, for every strategy and degree. Pure functions.

One layer on one rank, with `P = ulysses_degree * ring_degree` ranks and `L` bytes of queries on each:

- attention: 4 * heads * queries * keys * head_dim operations. A GPU computes tiles of queries, as many at a time as it
  has multiprocessors, so the last wave may be partly empty.
- Ulysses: exchanges of query, key, value and output, each of `L * (u - 1) / u` bytes (arXiv 2309.14509), which nothing
  hides, and packing. Query, key and value of equal shapes are one message, so there are two messages, or else four.
- ring: `r - 1` exchanges of a block of keys and values, each under the attention to the block before, and as many
  merges (arXiv 2310.01889). With Ulysses, both (arXiv 2405.07719).
- gather: all blocks at once, under the attention to the local block; or under the projections of the layer, followed by
  one call over all keys, which needs no merge. The faster of the two counts.
- collectives send keys and values packed, as one message; copies between GPUs send them from where they are, as two.

Everything else in a step is the same for all strategies. Steps are assumed to be compiled or recorded: a host that is
too slow to launch the kernels is not part of the prediction. docs/cost_model.md compares predictions with measured
times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..providers.hardware import DeviceKind, Hardware


class Workload(NamedTuple):
    """The attention layers of one kind in a model."""

    tokens: int
    """Number of tokens of the split sequence, of all ranks together."""
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    flops: float
    """Floating-point operations per second of the attention kernel, if all multiprocessors are busy."""
    itemsize: int = 2
    """Bytes of an element."""
    weights_overlapped: int = 0
    """Number of weights of the matrix products of a layer that are computed while keys and values travel."""


class Strategy(NamedTuple):
    """How the ranks share attention."""

    ulysses_degree: int
    ring_degree: int
    rotate_method: str | None
    """"allgather" or "alltoall"; None without a ring."""

    def __str__(self) -> str:
        ring = f"a {'gather' if self.rotate_method == 'allgather' else 'ring'} of {self.ring_degree}"
        if self.ring_degree == 1:
            return f"Ulysses over {self.ulysses_degree}"
        return ring if self.ulysses_degree == 1 else f"Ulysses over {self.ulysses_degree} within {ring}"


def step_seconds(
    works: Sequence[Workload], strategy: Strategy, hardware: Hardware, kind: DeviceKind, ranks_per_node: int
) -> float:
    """Seconds of attention, exchanges and merges in one forward.

    Args:
        works: the layers of all models of the pipeline.
        ranks_per_node: number of neighbouring ranks that are on one host.
    """
    return sum(each.layers * layer_seconds(each, strategy, hardware, kind, ranks_per_node) for each in works)


def layer_seconds(
    work: Workload,
    strategy: Strategy,
    hardware: Hardware,
    kind: DeviceKind,
    ranks_per_node: int,
    *,
    apart: bool = False,
) -> float:
    """Seconds of one layer; see `step_seconds`.

    Args:
        apart: whether Ulysses sends query, key and value in a message each, as in early recorded runs.
    """
    ulysses, ring = strategy.ulysses_degree, strategy.ring_degree
    ulysses_seconds = _ulysses_seconds(work, strategy, hardware, kind, ranks_per_node, apart) if ulysses > 1 else 0.0
    if ring == 1:
        return ulysses_seconds + attention_seconds(work, work.tokens, work.tokens, ulysses, hardware, kind)
    if strategy.rotate_method == "alltoall":
        return ulysses_seconds + _ring_seconds(work, strategy, hardware, kind, ranks_per_node)
    two_calls = gather_seconds(work, strategy, hardware, kind, ranks_per_node, at_once=False)
    if ulysses > 1 or hardware.copies is None or ring > ranks_per_node:
        return ulysses_seconds + two_calls
    return min(two_calls, gather_seconds(work, strategy, hardware, kind, ranks_per_node, at_once=True))


def attention_seconds(
    work: Workload, queries: float, keys: float, ulysses: int, hardware: Hardware, kind: DeviceKind
) -> float:
    """Seconds of one call of the kernel with `1 / ulysses` of the heads."""
    tiles = math.ceil(work.heads / ulysses) * math.ceil(queries / kind.query_tile)
    waves = math.ceil(tiles / hardware.multiprocessors)
    flops_of_a_wave = 4 * kind.query_tile * keys * work.head_dim * hardware.multiprocessors
    return waves * flops_of_a_wave / work.flops + kind.launch_seconds


def peak_flops(flops: float, tiles: int, multiprocessors: int) -> float:
    """The speed of a kernel with all multiprocessors busy, from its speed in a call with this number of tiles."""
    return flops * math.ceil(tiles / multiprocessors) * multiprocessors / tiles


def gather_seconds(
    work: Workload,
    strategy: Strategy,
    hardware: Hardware,
    kind: DeviceKind,
    ranks_per_node: int,
    *,
    at_once: bool,
    overlap_pass: bool = True,
) -> float:
    """Seconds of one layer with a gather, without the exchange of Ulysses.

    Args:
        at_once: one call over all keys when they have arrived; otherwise two calls and a merge.
        overlap_pass: whether keys and values are sent before the projections of the queries, as in compiled graphs.
    """
    ulysses, ring = strategy.ulysses_degree, strategy.ring_degree
    queries = work.tokens / ring
    transfer = _transfer_seconds(work, strategy, hardware, kind, ranks_per_node, ring - 1, 1)
    products = 2 * work.weights_overlapped * queries / hardware.matrix_flops
    exposed = max(0.0, transfer - products) if overlap_pass and ulysses == 1 and kind.overlaps else transfer
    if at_once:
        own = 2 * _block_bytes(work, strategy) / hardware.memory_bytes_per_second
        return exposed + own + attention_seconds(work, queries, work.tokens, ulysses, hardware, kind)
    local = attention_seconds(work, queries, queries, ulysses, hardware, kind)
    others = attention_seconds(work, queries, queries * (ring - 1), ulysses, hardware, kind)
    return _overlapped(exposed, local, kind) + others + _merge_seconds(work, strategy, hardware, kind)


def _ring_seconds(
    work: Workload, strategy: Strategy, hardware: Hardware, kind: DeviceKind, ranks_per_node: int
) -> float:
    ring = strategy.ring_degree
    block = work.tokens / ring
    call = attention_seconds(work, block, block, strategy.ulysses_degree, hardware, kind)
    transfer = _transfer_seconds(work, strategy, hardware, kind, ranks_per_node, 1, ring - 1)
    merge = _merge_seconds(work, strategy, hardware, kind)
    return (ring - 1) * (_overlapped(transfer, call, kind) + merge) + call


def _ulysses_seconds(
    work: Workload, strategy: Strategy, hardware: Hardware, kind: DeviceKind, ranks_per_node: int, apart: bool
) -> float:
    """Exchanges of query, key, value and output."""
    ulysses = strategy.ulysses_degree
    token = work.tokens / (ulysses * strategy.ring_degree) * work.head_dim * work.itemsize
    # Key heads that do not divide are repeated.
    kv_heads = work.kv_heads if work.kv_heads % ulysses == 0 else work.heads
    away = max(0, ulysses - ranks_per_node) if hardware.between else 0
    together = kv_heads == work.heads and not apart
    messages = (3 * work.heads, work.heads) if together else (work.heads, kv_heads, kv_heads, work.heads)
    seconds = 0.0
    for heads in messages:
        part = token * heads / ulysses
        near = hardware.within.time(part * (ulysses - 1 - away))
        seconds += max(near, hardware.between.time(part * away)) if away and hardware.between else near
    packing = kind.pack_passes * token * work.heads / hardware.memory_bytes_per_second
    return seconds + packing + len(messages) * kind.launch_seconds


def _transfer_seconds(
    work: Workload,
    strategy: Strategy,
    hardware: Hardware,
    kind: DeviceKind,
    ranks_per_node: int,
    blocks: int,
    transfers: int,
) -> float:
    """Seconds until this number of blocks of keys and values has arrived, in each of `transfers`. Collectives need them
    packed, once for all of these: values are copied for that, while keys are computed where they are packed."""
    ulysses, ring = strategy.ulysses_degree, strategy.ring_degree
    nbytes = _block_bytes(work, strategy)
    packing = nbytes / hardware.memory_bytes_per_second / transfers
    if hardware.between is None or ulysses * ring <= ranks_per_node:
        if hardware.copies is not None:
            return hardware.copies.time(blocks * nbytes, 2 * blocks) + kind.launch_seconds
        return packing + hardware.within.time(blocks * nbytes) + kind.launch_seconds
    near = max(1, ranks_per_node // ulysses) - 1 if blocks > 1 else 0
    away = blocks - near
    return packing + max(hardware.within.time(near * nbytes), hardware.between.time(away * nbytes))


def _block_bytes(work: Workload, strategy: Strategy) -> float:
    """Bytes of the keys and values that a rank sends along the ring."""
    tokens, heads = work.tokens / strategy.ring_degree, work.kv_heads / strategy.ulysses_degree
    return 2 * tokens * heads * work.head_dim * work.itemsize


def _merge_seconds(work: Workload, strategy: Strategy, hardware: Hardware, kind: DeviceKind) -> float:
    tokens, heads = work.tokens / strategy.ring_degree, work.heads / strategy.ulysses_degree
    nbytes = tokens * heads * work.head_dim * work.itemsize
    return kind.merge_passes * nbytes / hardware.memory_bytes_per_second + kind.launch_seconds


def _overlapped(transfer: float, compute: float, kind: DeviceKind) -> float:
    return max(transfer, compute) if kind.overlaps else transfer + compute
