"""Ranks that wait for another on their devices, told which one, while nothing else can tell them.

An exchange between GPUs does not fail where a rank never comes: the hosts go on until they need a result, and NCCL ends
the process long after, with an error that names no rank. Models whose ranks compare their inputs meet between hosts in
every forward, and raise an error that does. Others (`inputs="trust"`), and a rank that stops in the last forward, are
watched here: a thread looks from time to time whether this rank has begun or ended a forward. If it has not for as long
as ranks wait for each other, the thread reads where the others are, and logs an error that names those that are behind.
NCCL, which waits a quarter longer, ends the process after it.

Forwards pay nothing for this: the thread compares two numbers every few seconds, and reads the job's store only where
they have stayed the same for that long. It cannot tell apart ranks that are all at the same place, and does not see
forwards of a model that is compiled as a whole (`torch.compile(model)`) with `inputs="trust"`.
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
    """These ranks are watched, until it is removed or deleted.

    Args:
        ranks: those that share a sequence, with this one.
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
        """Tells of ranks that are behind, where there are any.

        Args:
            number: of notes that this rank has made.
            quiet: for how many seconds it has made no other.
        """
        if quiet < self.seconds or _told.get(self.ranks) == number:
            return
        said = rank_progress.behind(self.ranks)
        if said is not None:
            _told[self.ranks] = number
            log.error(
                "ranks that share a sequence have waited for each other for %.0f s, which is the timeout: %s They may "
                "have failed, skipped a call or be slow: see their messages. This process keeps waiting, and NCCL ends "
                "it with an error that names no rank.",
                quiet,
                said,
            )


_told: dict[tuple[int, ...], int] = {}
"""of which ranks it was told that some are behind, and how many notes this rank had made: once is enough."""
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
