"""Processes that end when the process that started them ends, even if that one is killed."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_STDIN = 0
"""the descriptor. `sys.stdin` may be another object, for instance in a notebook and under pytest."""
_POLL = 1.0
"""Seconds between two checks of the parent, if no pipe or sentinel reports its end."""


def end_with_parent(folder: Path | None = None) -> None:
    """Starts a thread that ends this process as soon as its parent has ended for any reason.

    A process of `multiprocessing` has a sentinel of its parent. Any other child reads its standard input, if that is a
    pipe from the parent (`stdin=subprocess.PIPE`), and otherwise checks its parent's process number.

    Args:
        folder: a temporary folder of the parent, which is removed then, since the parent no longer can.
    """
    _when(_wait_for_parent(), lambda: _end(folder))


def ended_with_parent(command: Sequence[str | Path]) -> list[str]:
    """`command` under a supervisor: a process that kills it, and every process that it started, when this one ends.

    For launchers such as torchrun: their ranks live in sessions of their own, and outlive a launcher that is killed.
    Start it with `subprocess.Popen(..., stdin=subprocess.PIPE)`; closing that pipe ends it, too. The supervisor returns
    the command's exit code, and 128 and the number of the signal where a signal ended it. It needs psutil, which
    Accelerate installs.
    """
    # As a script and without its folder on the path: the package would import torch.
    return [sys.executable, "-P", __file__, *map(str, command)]


def end_child_with_parent() -> Callable[[], object]:
    """A `preexec_fn` for a program that ends its own children at SIGTERM, as torchrun does: on Linux, it gets SIGTERM
    when this process ends for any reason. Elsewhere it does nothing."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    # The library is loaded before the fork, after which little is safe.
    return functools.partial(ctypes.CDLL(None).prctl, set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)


def _wait_for_parent() -> Callable[[], object]:
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.join
    if _is_pipe(_STDIN):
        return functools.partial(_read_all, _STDIN)
    number = os.getppid()

    def poll() -> None:
        while os.getppid() == number:
            time.sleep(_POLL)

    return poll


def _read_all(descriptor: int) -> None:
    # Not `sys.stdin.read`: it holds a lock that Python wants when this process ends by itself.
    while os.read(descriptor, 4096):
        pass


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:  # it is closed
        return False


def _when(wait: Callable[[], object], then: Callable[[], None]) -> None:
    def work() -> None:
        wait()
        then()

    threading.Thread(target=work, name="end-with-parent", daemon=True).start()


def _end(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _supervise(command: list[str]) -> int:
    import psutil

    _adopt_orphans()
    myself = psutil.Process()

    def kill_all() -> None:
        # Again until none is left: one that was starting another is killed first, and then the other.
        while children := myself.children(recursive=True):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=_POLL)

    def end(*_: object) -> None:
        kill_all()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command as well, which may then finish
    wait = _wait_for_parent()
    job = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _when(wait, end)
    code = job.wait()
    kill_all()
    return code if code >= 0 else 128 - code


def _adopt_orphans() -> None:
    """On Linux, makes children of a descendant that ended children of this process, which can find them then."""
    if sys.platform == "linux":
        import ctypes

        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
