"""Meetings of ranks over their hosts: barriers and exchanges of a few bytes, through the job's store.

A meeting that lacks a rank ends with an error that names it (`rank_progress`): after the timeout, or earlier, when the
rank's process has ended or no rank computes anything any more (`activity`).
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from . import rank_progress
from .activity import Quiet
from .process_groups import own_store

_PAUSE = 0.02
"""Longest time in seconds between two looks into the store whether the others have come."""
_LOOK = 5.0
"""Longest time in seconds between two looks at whether their processes run and compute."""
_meetings: tuple[object, dict[tuple[str, tuple[int, ...]], int]] = (None, {})
"""A job, and how often each set of its ranks has met on each channel."""


def meet(ranks: Sequence[int], timeout: datetime.timedelta) -> None:
    """A barrier: returns when all these ranks have called this equally often.

    Raises:
        RankMissingError: a rank has not called this within the timeout.
    """
    gather_bytes(ranks, b"", timeout)


def gather_bytes(ranks: Sequence[int], data: bytes, timeout: datetime.timedelta, channel: str = "") -> list[bytes]:
    """Gathers the bytes of each of these ranks, in their order. All of them must call this equally often.

    The bytes go through the job's store. A collective would make NCCL create a communicator, which takes hundreds of
    MiB of every GPU; and one of gloo cannot be ended before its timeout, also where no other rank will come.

    Args:
        channel: calls on different channels are counted separately.

    Raises:
        RankMissingError: a rank has not called this within the timeout, has ended, or no rank has computed anything for
            so long as `rank_progress.wait_for_idle_ranks` sets.
    """
    global _meetings
    if _meetings[0] is not dist.group.WORLD:
        _meetings = dist.group.WORLD, {}
    members = tuple(ranks)
    number = _meetings[1].get((channel, members), 0) + 1
    place = f"{rank_progress.PREFIX}meeting/{channel}{'_'.join(map(str, members))}"
    own = f"{place}/{number}/{dist.get_rank()}"
    store = own_store()
    with rank_progress.waiting_for(members):
        store.set(own, data)
        try:
            keys = {rank: f"{place}/{number}/{rank}" for rank in members}
            _wait(keys, timeout.total_seconds())
            found = store.multi_get(list(keys.values()))
        except BaseException:
            store.delete_key(own)  # a rank that comes late must not believe that this one is waiting
            raise
    _meetings[1][channel, members] = number
    if number > 2:  # a rank that comes to a meeting has left the one before the last
        with contextlib.suppress(Exception):
            store.delete_key(f"{place}/{number - 2}/{dist.get_rank()}")
    return found


def _wait(keys: Mapping[int, str], timeout: float) -> None:
    """Waits until the store has the key of every rank. Raises dist.DistError if one does not come."""
    store, names, idle = own_store(), list(keys.values()), min(timeout, rank_progress.idle_limit())
    start = now = time.monotonic()
    until, look, quiet = start + timeout, start + min(_LOOK, idle / 4), Quiet(idle)
    # Not `store.wait`: PyTorch logs a warning when it times out, and Ctrl-C waits for its end.
    while not store.check(names):
        time.sleep(min((now - start) / 64, _PAUSE))  # so a rank goes on at most a 64th of its wait too late
        now = time.monotonic()
        if now < min(look, until):
            continue
        look = now + min(_LOOK, idle / 4)
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        found = rank_progress.positions([rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()])
        if any(rank in found and found[rank].state == "ended" for rank in missing):
            raise dist.DistError("a process has ended")
        if now >= until:
            raise dist.DistError(f"it has waited for {timeout:g} s")
        if quiet.seconds({**dict.fromkeys(missing), **{rank: each.process for rank, each in found.items()}}) >= idle:
            raise dist.DistError(f"no rank has computed anything for {idle:g} s")
