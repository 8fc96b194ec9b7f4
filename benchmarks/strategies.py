"""The strategies that benchmarks compare, by name."""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """What a variant does; degrees of 0 are the number of ranks."""

    side: str
    """single: on each rank alone; diffusers; ours; auto: ours, as `enable_context_parallel` chooses."""
    ring: int = 1
    ulysses: int = 1
    rotate_method: str = "allgather"
    in_graph: bool = False
    """whether the step is recorded as a CUDA graph."""


STRATEGIES = {
    "single": Strategy("single"),
    "diffusers-ulysses": Strategy("diffusers", ulysses=0),
    "diffusers-ring": Strategy("diffusers", ring=0),
    "diffusers-unified": Strategy("diffusers", ring=2, ulysses=2),
    "ulysses": Strategy("ours", ulysses=0),
    "ring": Strategy("ours", ring=0, rotate_method="alltoall"),
    "gather": Strategy("ours", ring=0),
    "unified-ring": Strategy("ours", ring=2, ulysses=2, rotate_method="alltoall"),
    "unified-gather": Strategy("ours", ring=2, ulysses=2),
    "auto": Strategy("auto"),
}
GRAPH = "+graph"
STRATEGIES |= {name + GRAPH: strategy._replace(in_graph=True) for name, strategy in STRATEGIES.items()}
