"""Starts a module on several processes of this machine by torch.distributed.run, or runs it in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


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
    try:
        return process.wait()
    except BaseException:
        process.terminate()  # it ends the processes that it started
        process.wait()
        raise
