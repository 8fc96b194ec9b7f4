"""Processes that run cells, so that a kernel that faults or hangs ends its own process and no other cell."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from diffusers_attn.parent_process import end_with_parent

from .cell import FAULT, Outcome, outcome
from .features import FEATURES
from .statements import passes_of

LIMIT = 240.0
"""seconds for a cell, most of which is compiling; and for a process to start."""


class Cell(NamedTuple):
    provider: str
    strategy: str
    feature: str
    name: str
    """The pass."""


def cells_of(providers: Iterable[str], strategies: Iterable[str], device: str) -> list[Cell]:
    """All cells of these providers and strategies."""
    return [
        Cell(provider, strategy, feature, name)
        for provider, strategy in itertools.product(providers, strategies)
        for feature, call in FEATURES.items()
        for name in passes_of(provider, strategy, call, device)
    ]


def _work(connection: Connection, device: str) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False  # of the definition
    where = torch.device(device)
    connection.send(None)
    while True:
        cell: Cell = connection.recv()
        torch.manual_seed(0)
        start = time.monotonic()
        found = outcome(cell.provider, cell.feature, cell.name, where)
        connection.send((found, time.monotonic() - start))


class _Worker:
    def __init__(self, device: str) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device), daemon=True)
        self.process.start()
        theirs.close()
        self.cell: Cell | None = None
        self.since = time.monotonic()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def run(cells: list[Cell], device: str, number: int, seconds: float) -> Iterator[tuple[Cell, Outcome, float]]:
    """The outcome and the seconds of each cell, in the order in which they end.

    Args:
        number: processes side by side.
        seconds: when they have passed, no cell starts.
    """
    until = time.monotonic() + seconds
    left = deque(cells)
    workers = [_Worker(device) for _ in range(min(number, len(cells)))]
    try:
        while workers:
            wait([worker.connection for worker in workers], timeout=1.0)
            for worker in list(workers):
                found: Any = None
                late = time.monotonic() - worker.since > LIMIT
                if worker.connection.poll():
                    try:
                        found = worker.connection.recv()
                    except EOFError:
                        found = f"{FAULT}its process ended with {_code(worker)}", time.monotonic() - worker.since
                elif late:
                    found = f"{FAULT}no answer within {LIMIT:.0f} s", LIMIT
                else:
                    continue
                workers.remove(worker)
                if worker.cell is not None:
                    yield worker.cell, *found
                elif found is not None:
                    raise RuntimeError(f"a process for cells does not start: {found[0]}")
                faulty = found is not None and isinstance(found[0], str) and found[0].startswith(FAULT)
                if faulty:  # its device, allocator or compiler may be in disorder
                    worker.end()
                if not left or time.monotonic() > until:
                    worker.end()
                    continue
                if faulty:
                    worker = _Worker(device)
                else:
                    worker.cell = left.popleft()
                    worker.connection.send(worker.cell)
                    worker.since = time.monotonic()
                workers.append(worker)
    finally:
        for worker in workers:
            worker.end()


def _code(worker: _Worker) -> int | None:
    worker.process.join(10)
    return worker.process.exitcode
