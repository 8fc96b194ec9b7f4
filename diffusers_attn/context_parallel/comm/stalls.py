"""Names the missing rank when an exchange hangs.

If a rank never joins an exchange, the others wait. With inputs="broadcast" or "check", ranks meet over their hosts in
every forward, and the meeting raises an error that names the missing rank. This file is for all other cases
(`inputs="trust"`, or a rank that stops within a forward or after the last one).

- Exchanges between GPUs: hosts notice nothing until they need a result, and NCCL ends the process long after, with an
  error that names no rank. If this rank has begun and ended no forward for the whole timeout, those that are behind are
  named in the log. NCCL waits a quarter longer before it ends the process.
- Exchanges over gloo cannot be ended before their timeout. If this rank is within a forward or a backward, and no rank
  computes for `activity.IDLE`, a rank is stopped, or waits for something else: those that are behind are named in the
  log, and this process ends, as it does with NCCL.

Forwards pay nothing for this: a thread compares two numbers every few seconds, tells other machines that this process
is alive (`activity.beat`), and reads the job's store only after the timeout. Two cases go unnoticed with NCCL: all
ranks hang at the same place, and a model that is compiled as a whole (`torch.compile(model)`) with `inputs="trust"`.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from . import activity, one_thread, rank_progress

log = logging.getLogger(__name__)

_LATER = 5.0
"""Seconds for a meeting of the hosts to raise its error first."""


class Watch:
    """Watches ranks until it is removed or deleted.

    Args:
        ranks: the ranks that share a sequence, including this one.
        timeout: how long they wait for each other.
        ends_process: whether this process ends when it waits while no rank computes.
    """

    def __init__(self, ranks: Sequence[int], timeout: datetime.timedelta, ends_process: bool = False) -> None:
        self.ranks = tuple(ranks)
        self.seconds = timeout.total_seconds()
        self.ends_process = ends_process
        self._quiet: activity.Quiet | None = None
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
        if self.ends_process:
            self._end_if_idle(quiet)
        elif quiet >= self.seconds and _reported.get(self.ranks) != number:
            missing = rank_progress.behind(self.ranks)
            if missing is not None:
                _reported[self.ranks] = number
                log.error(
                    "ranks that share a sequence have waited for each other for %.0f s, which is the timeout: %s They "
                    "may have failed, skipped a call or be slow: see their messages. This process keeps waiting, and "
                    "NCCL ends it with an error that names no rank.",
                    quiet,
                    missing,
                )

    def _end_if_idle(self, quiet: float) -> None:
        """Ends this process if it is within a forward or a backward, and no rank computes."""
        limit = rank_progress.idle_limit() + _LATER
        running = None if quiet < min(5.0, limit / 4) else one_thread.running()
        if running is None:
            self._quiet = None
            return
        self._quiet = self._quiet or activity.Quiet(limit)
        idle = rank_progress.idle_for(self._quiet)
        if quiet < limit or idle < limit:
            return
        log.error(
            "within %s, this rank has waited for others for %.0f s, in which no rank computed anything: %s This "
            "process ends, since an exchange over gloo cannot be ended. (enable_context_parallel(timeout=...) sets how "
            "long ranks wait.)",
            running,
            quiet,
            rank_progress.behind(self.ranks) or f"rank {rank_progress.here()}.",
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


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
        activity.beat()
        _changed.wait(min(5.0, *(each.seconds / 4 for each in watches)))
        _changed.clear()
        if rank_progress.notes() != number:
            number, since = rank_progress.notes(), time.monotonic()
        for each in watches:
            each.look(number, time.monotonic() - since)
        del watches, each  # so that those that are deleted end
