"""Starts a module on several processes of this machine by torch.distributed.run, or runs it in this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ..parent_process import end_child_with_parent

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def launch(module: str, arguments: Sequence[str], processes: int) -> int:
    """Runs `python -m module arguments` on several processes that can reach each other. Returns the exit code; not 0 if
    any of them failed. What they print goes to stderr.

    Args:
        processes: number of processes; on GPUs, the number of GPUs.
    """
    # The same search path as here, and one thread for each process, as torch.distributed.run sets with a warning.
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    # torch.distributed.run does not remove the folder that it makes for logs.
    with tempfile.TemporaryDirectory(prefix="diffusers-attn-logs-") as logs:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
            "--log-dir", logs, "-m", module, *arguments,
        ]  # fmt: skip
        # In a session of its own a terminal does not send it signals, so that it gets each of them once, from here.
        process = subprocess.Popen(
            command, env=environment, stdout=sys.__stderr__, start_new_session=True,
            preexec_fn=end_child_with_parent(),
        )  # fmt: skip
        with _signals_go_to(process):
            return process.wait()


@contextlib.contextmanager
def _signals_go_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes signals that end a program on to another one, whose end is then this one's."""
    handlers: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            handlers[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    except ValueError:
        pass  # signals are handled in the main thread only
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.terminate()
