"""The strategies that benchmarks compare, by name."""

from __future__ import annotations

from typing import NamedTuple


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
    allgather_kv_one_call: bool | None = None
    """Whether compiled attention waits for all keys; None leaves the choice to the library."""
    inputs: str = "trust"
    """The `inputs` argument of `enable_context_parallel`, for "auto"."""
    sends: bool = True
    """False: copy engines send nothing and no rank waits. Results are wrong; the time shows the cost of an exchange."""


STRATEGIES = {
    "single": Strategy("single"),
    "diffusers-ulysses": Strategy("diffusers", ulysses=0),
    "diffusers-ring": Strategy("diffusers", ring=0),
    "diffusers-unified": Strategy("diffusers", ring=2, ulysses=2),
    "ulysses": Strategy("ours", ulysses=0),
    "ring": Strategy("ours", ring=0, rotate_method="alltoall"),
    "gather": Strategy("ours", ring=0),
    "gather-one-call": Strategy("ours", ring=0, allgather_kv_one_call=True),
    "gather-two-calls": Strategy("ours", ring=0, allgather_kv_one_call=False),
    "gather-nothing-sent": Strategy("ours", ring=0, sends=False),
    "unified-ring": Strategy("ours", ring=2, ulysses=2, rotate_method="alltoall"),
    "unified-gather": Strategy("ours", ring=2, ulysses=2),
    "auto": Strategy("auto"),
    "defaults": Strategy("auto", inputs="broadcast"),
}
USUAL = [
    name
    for name, each in STRATEGIES.items()
    if each.allgather_kv_one_call is None and each.sends and each.side != "auto"
]
GRAPH = "+graph"
STRATEGIES |= {name + GRAPH: strategy._replace(in_graph=True) for name, strategy in STRATEGIES.items()}
