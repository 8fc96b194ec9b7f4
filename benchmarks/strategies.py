"""The strategies that benchmarks compare, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mechanisms import SWITCHES


class Strategy(NamedTuple):
    """A strategy. A degree of 0 stands for the number of ranks."""

    side: str
    """"single" (each rank alone), "diffusers", "ours", or "auto" (ours, with the degrees that
    `enable_context_parallel` chooses)."""
    ring: int = 1
    ulysses: int = 1
    rotate_method: str = "allgather"
    in_graph: bool = False
    """Whether the step is recorded as a CUDA graph."""
    arguments: Mapping[str, Any] = {}
    """Arguments of `enable_context_parallel`, for "auto"."""
    switches: tuple[str, ...] = ()
    """Names of switches in `mechanisms.SWITCHES` that are set in every step."""


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
    "auto": Strategy("auto", arguments={"inputs": "trust", "cuda_graphs": False}),
    "defaults": Strategy("auto"),
    "defaults-trust": Strategy("auto", arguments={"inputs": "trust"}),
    "defaults-no-graph": Strategy("auto", arguments={"cuda_graphs": False}),
}
USUAL = [name for name, each in STRATEGIES.items() if each.side != "auto"]
SETS = {name: (name,) for name in SWITCHES} | {
    "one-call-late": ("one-call", "late"),
    "two-calls-late": ("two-calls", "late"),
}
STRATEGIES |= {
    f"{name}-{switches}": STRATEGIES[name]._replace(switches=SETS[switches])
    for name in ("gather", "defaults", "auto")
    for switches in SETS
}
GRAPH = "+graph"
STRATEGIES |= {name + GRAPH: strategy._replace(in_graph=True) for name, strategy in STRATEGIES.items()}
