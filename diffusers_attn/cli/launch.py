"""Starts a module on several processes of this machine by torch.distributed.run, or runs it in this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def launch(module: str, arguments: Sequence[str], processes: int) -> int:
    """Runs `python -m module arguments` on several processes that can reach each other. Returns the exit code; not 0 if
    any of them failed. What they print goes to stderr.

    Args:
        processes: number of processes; on GPUs, the number of GPUs.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module,
        *arguments,
    ]  # fmt: skip
    # The same search path as here, and one thread for each process, as torch.distributed.run sets with a warning.
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, stdout=sys.__stderr__)
    with _signals_go_to(process):
        return process.wait()


@contextlib.contextmanager
def _signals_go_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leaves the end of this process to another one. A terminal sends Ctrl-C to both; SIGTERM is passed on."""
    handlers: dict[int, Any] = {}
    try:
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    except ValueError:
        pass  # signals are handled in the main thread only
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.terminate()
