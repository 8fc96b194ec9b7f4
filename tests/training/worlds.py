"""Jobs of one to four processes within the four of one pool: what a run costs is then its own work, not starting up.

A job is a function of a module below `tests`, called as `job(**arguments)` on all ranks of its world, as if a launcher
had started it. Worlds that fit into four processes run at the same time.
"""

from __future__ import annotations

import datetime
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..context_parallel.pool import SIZE, Pool, serve, served

TIMEOUT = 240.0


class World(NamedTuple):
    """A job of `size` processes."""

    size: int
    job: Any
    arguments: dict[str, Any]


def run(pool: Pool, folder: Any, *worlds: World) -> list[list[Any]]:
    """What each job returned on each of its ranks. `folder` is for the meeting of processes; used once."""
    assert sum(world.size for world in worlds) <= SIZE
    answers = pool.run(SIZE, _place, folder=str(folder), worlds=worlds)
    firsts = [sum(world.size for world in worlds[:i]) for i in range(len(worlds))]
    return [answers[first : first + world.size] for first, world in zip(firsts, worlds)]


def _place(_: Any, folder: str, worlds: tuple[World, ...]) -> Any:
    place = int(os.environ["TEST_PLACE"])
    first = 0
    for number, world in enumerate(worlds):
        if first <= place < first + world.size:
            return _as_rank(place - first, world, os.path.join(folder, f"store-{number}"))
        first += world.size
    return None


def _as_rank(rank: int, world: World, store: str) -> Any:
    """The job, on a rank of its world; then everything as it was."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world.size, "LOCAL_WORLD_SIZE": world.size}
    if world.size > 1:
        os.environ |= {name: str(value) for name, value in launched.items()}
        timeout = datetime.timedelta(seconds=TIMEOUT / 2)
        job = served(store, rank, world.size)
        dist.init_process_group("gloo", store=job, rank=rank, world_size=world.size, timeout=timeout)
    try:
        return world.job(**world.arguments)
    finally:
        forget_accelerate()
        for name in launched:
            os.environ.pop(name, None)


def forget_accelerate() -> None:
    """Ends what Accelerate keeps in the process, so that another run can begin in it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def work(rank: int, store: str, jobs: Any, results: Any) -> None:
    """What a process of the pool runs."""
    torch.set_num_threads(1)
    os.environ |= {"TEST_PLACE": str(rank), "ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}
    serve(rank, None, _Jobs(jobs, rank, store), results)


class _Jobs:
    """The queue of jobs, which leaves no group behind a job, and has one of all processes at the end."""

    def __init__(self, jobs: Any, rank: int, store: str) -> None:
        self._jobs, self._rank, self._store = jobs, rank, store

    def get(self) -> Any:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        work = self._jobs.get()
        if work is None:
            dist.init_process_group("gloo", init_method=f"file://{self._store}", rank=self._rank, world_size=SIZE)
        return work
