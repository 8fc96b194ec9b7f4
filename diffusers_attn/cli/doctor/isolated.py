"""Runs a probe in a process of its own, which may crash, hang or print anything without harm to this one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a probe."""

    value: dict[str, Any] | None
    """What the probe returned; None if it did not return."""
    problem: str = ""
    """Why it did not return: the error, the signal that ended its process, or the time limit."""
    package: str = ""
    """The module, without submodules, whose code raised the error; empty if that is not known."""
    late: bool = False
    """Whether it was ended at the time limit."""


def run_probe(name: str, *arguments: str, timeout: float) -> Outcome:
    """Runs a function of `probe.py` in a new Python process with the search path of this one.

    Args:
        name: name of the function.
        arguments: its arguments.
        timeout: seconds after which the process is killed, with the processes that it started.
    """
    with tempfile.TemporaryDirectory(prefix="diffusers-attn-") as folder:
        answer, log = Path(folder) / "answer", Path(folder) / "log"
        # -P leaves out the current folder, in which a file may have the name of a package.
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", f"{__package__}.probe", str(answer), name]
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=os.name == "posix",
            )
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        try:
            found = json.loads(answer.read_text())
        except (OSError, ValueError):
            if code is None:
                return Outcome(None, f"it did not end within {timeout:.0f} s (the limit of --timeout)", late=True)
            return Outcome(None, _ended(code, log.read_text(errors="replace")))
        return Outcome(found.get("value"), found.get("problem", ""), found.get("package", ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it, with all of its processes
    else:
        process.kill()
    process.wait()


def _ended(code: int, log: str) -> str:
    """Why a process ended without an answer, with the place in which Python's fault handler saw it."""
    how = f"its process ended with exit code {code}"
    if code < 0:
        try:
            how = f"its process was ended by {signal.Signals(-code).name}"
        except ValueError:
            how = f"its process was ended by signal {-code}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    place = next((line for line in lines if line.startswith('File "')), "")
    last = place or (lines[-1][:300] if lines else "")
    return f"{how} ({last})" if last else how
