"""Names the missing rank when an exchange between GPUs hangs.

If a rank never joins an exchange, the other GPUs wait. Their hosts notice nothing until they need a result, and NCCL
ends the process long after, with an error that names no rank. With inputs="broadcast" or "check", ranks meet over their
hosts in every forward, and the meeting raises an error that names the missing rank. This file is for all other cases
(`inputs="trust"`, or a rank that stops in the last forward).

A thread checks every few seconds whether this rank has begun or ended a forward. If it has not for the whole timeout,
the thread reads the positions of the other ranks, and logs an error that names those that are behind. NCCL waits a
quarter longer before it ends the process.

Forwards pay nothing for this: the thread compares two numbers, and reads the job's store only after the timeout. Two
cases go unnoticed: all ranks hang at the same place, and a model that is compiled as a whole (`torch.compile(model)`)
with `inputs="trust"`.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
import weakref
from collections.abc import Sequence

from . import rank_progress

log = logging.getLogger(__name__)


class Watch:
    """Watches ranks until it is removed or deleted.

    Args:
        ranks: the ranks that share a sequence, including this one.
        timeout: how long they wait for each other.
    """

    def __init__(self, ranks: Sequence[int], timeout: datetime.timedelta) -> None:
        self.ranks = tuple(ranks)
        self.seconds = timeout.total_seconds()
        with _lock:
            _watches.add(self)
            _start()

    def remove(self) -> None:
        with _lock:
            _watches.discard(self)
        _changed.set()

    def look(self, number: int, quiet: float) -> None:
        """Logs an error if ranks are behind, once for each standstill.

        Args:
            number: number of notes that this rank has made.
            quiet: seconds since the last of them.
        """
        if quiet < self.seconds or _reported.get(self.ranks) == number:
            return
        missing = rank_progress.behind(self.ranks)
        if missing is not None:
            _reported[self.ranks] = number
            log.error(
                "ranks that share a sequence have waited for each other for %.0f s, which is the timeout: %s They may "
                "have failed, skipped a call or be slow: see their messages. This process keeps waiting, and NCCL ends "
                "it with an error that names no rank.",
                quiet,
                missing,
            )


_reported: dict[tuple[int, ...], int] = {}
"""The ranks for which an error was logged, with the number of notes that this rank had made then."""
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_lock = threading.Lock()
_changed = threading.Event()
_thread: threading.Thread | None = None


def _start() -> None:
    global _thread
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_run, name="diffusers_attn: ranks that are behind", daemon=True)
        _thread.start()
    _changed.set()


def _run() -> None:
    global _thread
    number, since = rank_progress.notes(), time.monotonic()
    while True:
        with _lock:
            watches = list(_watches)
            if not watches:
                _thread = None
                return
        _changed.wait(min(5.0, *(each.seconds / 4 for each in watches)))
        _changed.clear()
        if rank_progress.notes() != number:
            number, since = rank_progress.notes(), time.monotonic()
        for each in watches:
            each.look(number, time.monotonic() - since)
        del watches, each  # so that those that are deleted end
