"""Processes end with the one that started them, and take its temporary folder along."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from .launching import TIMEOUT

ROOT = Path(__file__).parents[1]

VERIFY = """
import os, time, torch
from diffusers_attn import CPInput, CPOutput, ParamId, verify_cp_plan

class Waits(torch.nn.Module):
    def forward(self, x):
        open(os.path.join(os.environ["TMPDIR"], f"ready-{os.getpid()}"), "w").close()
        time.sleep(600)

if __name__ == "__main__":
    verify_cp_plan(Waits(), [torch.randn(2, 5, 8)], {"": [{ParamId("x"): CPInput(1)}, CPOutput(1)]})
"""

PYTEST = """
import os, subprocess, sys, time

from tests import launching
from tests.context_parallel.pool import Pool

NOTE = "open(os.path.join(os.environ['TMPDIR'], f'ready-{os.getpid()}'), 'w').close()"
READY = f"import os, time; {NOTE}; time.sleep(600)"
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {READY!r}], start_new_session=True)"


def work(rank, store, jobs, results):
    exec(READY)


def test_pool():
    Pool(work, size=2, timeout=600).run(2, print)


def test_launcher():
    launching.run([sys.executable, "-c", LAUNCHER])
"""


def _name(number: int) -> str:
    return signal.Signals(number).name


@pytest.mark.slow
def test_verify_cp_plan(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(VERIFY)
    assert _left_by([sys.executable, "script.py"], tmp_path, signal.SIGKILL, ready=2) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)], ids=_name)
def test_pytest(tmp_path: Path, number: int) -> None:
    """A pool, and a launcher whose child is in a session of its own, in two workers of pytest-xdist."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *")
    (tmp_path / "test_waiting.py").write_text(PYTEST)
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "test_waiting.py"]
    assert _left_by(command, tmp_path, number, ready=3) == []


def _left_by(command: list[str], where: Path, number: int, ready: int) -> list[str]:
    """Sends a signal to a command as soon as `ready` of its descendants are at work; what it leaves behind."""
    # Not in `where`: it becomes a part of addresses of sockets, which must be short.
    folder = Path(tempfile.mkdtemp(prefix="end-"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    output = where / "output"
    with output.open("w") as log:
        # A command that runs in the background of a shell ignores SIGINT, and so do all that it starts.
        heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        parent = subprocess.Popen(command, cwd=where, env=environment, stdout=log, stderr=log, preexec_fn=heeds)
    children: list[psutil.Process] = []
    try:
        until = time.monotonic() + TIMEOUT
        while len(list(folder.glob("ready-*"))) < ready:
            assert parent.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= ready
        parent.send_signal(number)
        _, remaining = psutil.wait_procs(children, timeout=TIMEOUT)
        left = [" ".join(process.cmdline()) for process in remaining]
        parent.wait(TIMEOUT)
    finally:
        for process in [*children, parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    # The compiler's cache outlives its processes, a socket of multiprocessing's one that was killed, and pytest keeps
    # the folders of its last runs.
    others = ("ready", "torchinductor", "pymp", "pytest-of")
    left += [path.name for path in folder.iterdir() if not path.name.startswith(others)]
    shutil.rmtree(folder)
    return left
