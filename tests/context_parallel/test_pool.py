"""The pool on a busy machine: a slow start is not an error, and a process that has ended is noticed."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

from .pool import Pool, serve

LIMIT = 2.0
"""seconds that a job may take here. The start takes longer."""


def work(rank: int, store: str, jobs: Any, results: Any) -> None:
    time.sleep(1.5 * LIMIT)
    serve_without_a_group(rank, jobs, results)


def serve_without_a_group(rank: int, jobs: Any, results: Any) -> None:
    import torch.distributed as dist

    dist.barrier = lambda: None
    serve(rank, None, jobs, results)


def answer(_: Any) -> int:
    return os.getpid()


def end(_: Any) -> None:
    sys.stdout.flush()
    os._exit(3)


def test_a_slow_start_and_a_process_that_ended() -> None:
    pool = Pool(work, size=1, timeout=LIMIT)
    try:
        first = pool.run(1, answer)
        assert pool.run(1, answer) == first
        with pytest.raises(RuntimeError, match=r"ranks \[0\] ended with \[3\]"):
            pool.run(1, end)
        assert pool.run(1, answer) != first  # of a new process
    finally:
        pool.close()


def make_a_group(_: Any) -> None:
    import torch.distributed as dist

    group = dist.new_group([0])
    if dist.get_rank() == 0:
        dist.destroy_process_group(group)


def test_groups_that_only_some_ranks_have_made_are_an_error(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="all ranks of a pool must make each group"):
        pool.run(1, make_a_group)
    pool.run(4, make_a_group)
