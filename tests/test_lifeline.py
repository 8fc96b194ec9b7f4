"""Processes end with the one that started them, and take its temporary folder along."""

from __future__ import annotations

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

POOL = """
import os, time
from tests.context_parallel.pool import Pool

def work(rank, store, jobs, results):
    open(os.path.join(os.environ["TMPDIR"], f"ready-{os.getpid()}"), "w").close()
    time.sleep(600)

if __name__ == "__main__":
    Pool(work, size=2, timeout=600).run(2, print)
"""


@pytest.mark.parametrize(
    ("script", "number"), [(VERIFY, signal.SIGKILL), (POOL, signal.SIGTERM)], ids=["verify_cp_plan", "pool"]
)
def test_children_end_with_their_parent(tmp_path, request, script, number):
    (tmp_path / "script.py").write_text(script)
    # Not in `tmp_path`: it becomes a part of addresses of sockets, which must be short.
    folder = Path(tempfile.mkdtemp(prefix="end-"))
    request.addfinalizer(lambda: shutil.rmtree(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment) as parent:
        try:
            children = _ready(folder, 2)
        finally:
            parent.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
    # The compiler's cache outlives its processes, and a socket of multiprocessing's one that was killed.
    others = ("ready", "torchinductor", "pymp")
    assert [path.name for path in folder.iterdir() if not path.name.startswith(others)] == []


def _ready(folder: Path, count: int) -> list[psutil.Process]:
    until = time.monotonic() + 120
    while len(found := list(folder.glob("ready-*"))) < count:
        assert time.monotonic() < until, "the children did not start"
        time.sleep(0.1)
    return [psutil.Process(int(path.name.removeprefix("ready-"))) for path in found]
