"""A process that ends when its parent ends, also where the parent was killed and could tell nobody."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_POLL = 1.0
"""seconds between two looks at the parent, where nothing else tells that it has ended."""


def end_with_parent(folder: Path | None = None) -> None:
    """Starts a thread that ends this process as soon as its parent has ended, for whatever reason.

    A process of `multiprocessing` has a sentinel of its parent. Any other child reads its standard input, if that is a
    pipe of which the parent holds the other end (`stdin=subprocess.PIPE`), and otherwise asks for its parent's number.

    Args:
        folder: a temporary folder of the parent, which is removed then, since the parent no longer can.
    """
    threading.Thread(target=_end, args=(_wait_for_parent(), folder), name="end-with-parent", daemon=True).start()


def _wait_for_parent() -> Callable[[], object]:
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.join
    if sys.stdin is not None and not sys.stdin.isatty() and _is_pipe(sys.stdin.fileno()):
        return sys.stdin.buffer.read
    number = os.getppid()

    def poll() -> None:
        while os.getppid() == number:
            time.sleep(_POLL)

    return poll


def _is_pipe(descriptor: int) -> bool:
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def _end(wait: Callable[[], object], folder: Path | None) -> None:
    wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
