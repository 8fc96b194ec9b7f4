"""A lock that admits one job at a time to a folder. The operating system releases it when its process ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ...json_files import read_json
from .disk import write_file
from .ranks import OtherRankError, Ranks
from .walk import RUN_MARK

log = logging.getLogger(__name__)

_LOCK = ".diffusers_attn-lock"
_SECONDS_BETWEEN = 1.0


class FolderLock:
    """A lock on a folder. A file in the folder names its current or last holder.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        self._mark = folder / RUN_MARK
        self._lock = FileLock(folder / _LOCK)

    def acquire(self) -> bool:
        """Acquires the lock if it is free, and returns whether it was."""
        from filelock import Timeout

        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
        write_file(self._mark, lambda path: path.write_text(holder))
        return True

    def release(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def holder(self) -> str:
        """Describes the holder: "process 123 on host a, since 2026-01-01 12:00:00+00:00"."""
        try:
            holder = read_json(self._mark)
            return f"process {holder['process']} on host {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # the file is being written
            return "another process"


@contextlib.contextmanager
def alone_in(folder: Path, ranks: Ranks, what: str) -> Iterator[None]:
    """Holds the lock of `folder` within this context. Waits for another holder and logs its name. All ranks must
    call this.

    Args:
        folder: a folder that all ranks can access; rank 0 holds the lock for all.
        ranks: the ranks of this job.
        what: the folder's name for the message.
    """
    lock: FolderLock | None = None
    waiting = False
    while True:
        acquired, failed = False, None
        try:
            if ranks.rank == 0:
                lock = lock or FolderLock(folder)
                acquired = lock.acquire()
        except OSError as error:
            failed = error
        if ranks.any(failed is not None):  # all ranks raise together, so that none waits for a failed one
            raise failed or OtherRankError(f"locking {folder} failed on another process; see its message.")
        if ranks.any(acquired):
            break
        if lock is not None and not waiting:
            waiting = True
            log.warning("%s %s is being filled by %s; waiting until that is done.", what, folder, lock.holder())
        time.sleep(_SECONDS_BETWEEN)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
