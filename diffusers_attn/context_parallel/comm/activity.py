"""Tells whether any rank of the job computes, so that a rank waits long for others that compute, and not for others
that are stopped, hang, or wait for something else.

A rank computes if its process and the processes that it started use the CPU: a host that waits for its GPU usually
spins. For ranks on this machine the times are read from /proc. Ranks on other machines write them into the job's store
(`beat`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from .process_groups import own_store

IDLE = 45.0
"""Seconds for which a rank waits for others while no rank computes, unless the user sets a timeout."""
_SHARE = 0.02
"""Share of one core below which a process only waits."""
_BEAT = "diffusers_attn/beat/"
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def cpu_seconds(process: int | str) -> float | None:
    """CPU time in seconds that a process of this machine and those that it started have used. None if it has ended, or
    where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        if state in "ZX":
            return None
        children = [each.read_text() for each in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return None
    own = sum(map(int, fields[10:14])) / _TICKS  # in user and kernel mode, then that of children that have ended
    return own + sum(cpu_seconds(child) or 0.0 for each in children for child in each.split())


def beat() -> None:
    """Tells ranks of other machines how much this one has computed."""
    spent = cpu_seconds(os.getpid())
    with contextlib.suppress(Exception):  # the job has ended, or is about to
        own_store().set(f"{_BEAT}{dist.get_rank()}", repr(time.process_time() if spent is None else spent))


class Quiet:
    """Measures for how long no rank has computed.

    Args:
        limit: the length of time in seconds that matters. In so much time, a rank that computes uses `_SHARE` of it.
    """

    def __init__(self, limit: float) -> None:
        self._least = _SHARE * limit
        self._since = time.monotonic()
        self._spent: dict[int, float] = {}

    def seconds(self, processes: Mapping[int, str | None]) -> float:
        """Seconds for which none of these ranks has computed, at most since this object exists.

        Args:
            processes: the number of each rank's process, by rank; None for one on another machine.
        """
        now = time.monotonic()
        for rank, process in processes.items():
            spent = _beat_of(rank) if process is None else cpu_seconds(process)
            if spent is None and process is None:  # nothing is known about it: it may compute
                self._since = now
            if spent is not None and spent - self._spent.setdefault(rank, spent) > self._least:
                self._since = now
        if self._since == now:
            self._spent.clear()
        return now - self._since


def _beat_of(rank: int) -> float | None:
    store, key = own_store(), f"{_BEAT}{rank}"
    return float(store.get(key)) if store.check([key]) else None
