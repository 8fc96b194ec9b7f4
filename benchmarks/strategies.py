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
    allgather_kv_one_call: bool | None = None
    """whether compiled attention awaits all keys, where that is not left to the library."""
    inputs: str = "trust"
    """of `auto`: what `enable_context_parallel` does about inputs that differ between ranks."""
    sends: bool = True
    """False: by copy engines nothing is sent and nobody waits. Results are wrong; it tells what an exchange costs."""


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
