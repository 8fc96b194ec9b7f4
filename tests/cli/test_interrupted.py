"""Ctrl-C on the command that started ranks, and signals to it alone: all of them end, and nothing is left."""

from __future__ import annotations

import contextlib
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

from diffusers_attn.parent_process import end_child_with_parent

from ..documents import ROOT
from ..launching import TIMEOUT
from ..marks import thorough_but

WITHIN = 60.0
"""seconds; torchrun waits 30 for its ranks"""
SIGNALS = [
    (signal.SIGINT, "the command"),
    (signal.SIGINT, "its group"),
    (signal.SIGTERM, "the command"),
    (signal.SIGKILL, "the command"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "whom"), thorough_but([SIGNALS[0], SIGNALS[-1]], SIGNALS))
def test_ranks_end_with_their_command(tmp_path: Path, number: int, whom: str) -> None:
    scratch = tempfile.mkdtemp(prefix="end-")
    picture = tmp_path / "picture.png"
    model, size = ROOT / "examples/tiny_flux", ["--height", "64", "--width", "64", "--steps", "100000"]
    command = [sys.executable, "-m", "diffusers_attn", "run", model, "a cat", *size, "--device", "cpu", "--gpus", "2"]
    command += ["--output", picture]
    environment = {**os.environ, "TMPDIR": scratch, "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with_pytest = end_child_with_parent()

    def begin() -> None:
        with_pytest()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is in the background ignores it

    with log.open("w") as output:
        job = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, preexec_fn=begin,
            start_new_session=True,
        )  # fmt: skip
    ranks: list[psutil.Process] = []
    try:
        until = time.monotonic() + TIMEOUT
        while "/100000" not in log.read_text():  # the first rank's steps
            assert job.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        ranks = psutil.Process(job.pid).children(recursive=True)
        assert len(ranks) >= 3  # torchrun and two ranks
        began = time.monotonic()
        os.killpg(job.pid, number) if whom == "its group" else job.send_signal(number)
        code = job.wait(TIMEOUT)
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT)
        assert time.monotonic() - began < WITHIN
    finally:
        for each in [*ranks, job]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
    assert code != 0 and not alive
    assert not picture.exists() and [path.name for path in tmp_path.iterdir()] == ["log"]
    left = [path.name for path in Path(scratch).iterdir() if not path.name.startswith("torchinductor")]
    shutil.rmtree(scratch)
    assert left == [] or number == signal.SIGKILL, log.read_text()
