"""`train` is the trainer: on one process within the command, on several through torch.distributed.run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusers_attn.cli import launch, main
from diffusers_attn.training import program

from ..documents import ROOT
from ..marks import thorough_but
from ..training.data.media import album
from .programs import command

TINY = str(ROOT / "examples/tiny_flux")
RUN = [
    "--model", TINY, "--cpu", "--resolution", "32", "--steps", "2", "--rank", "2", "--max_sequence_length", "8",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", thorough_but(["2"], ["1", "2"]))
def test_a_lora_is_trained(tmp_path: Path, processes: str) -> None:
    data = album(tmp_path / "data", 3)
    done = command("train", "--gpus", processes, *RUN, "--data", str(data), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert any("loss" in json.loads(line) for line in lines)


def test_settings_that_are_not_accepted() -> None:
    for processes in ("1", "2"):
        result = CliRunner().invoke(main.app, ["train", "--gpus", processes, "--model", TINY, "--speed", "3"])
        assert result.exit_code == 2
        assert "diffusers-attn train: " in result.stderr and "--speed" in result.stderr
        assert "All settings: diffusers-attn train --settings" in result.stderr


def test_an_error_of_the_trainer_is_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(main.app, ["train", *RUN, "--data", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "diffusers-attn train: " in result.stderr and "Traceback" not in result.stderr


def test_all_settings_are_listed() -> None:
    result = CliRunner().invoke(main.app, ["train", "--settings"])
    assert result.exit_code == 0 and "--cp_degree" in result.stdout and "--resume" in result.stdout
    assert program.DESCRIPTION.split(",")[0] in result.stdout


def test_sigterm_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    """As the trainer needs it, which saves a checkpoint after it."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import subprocess, sys\n"
        "from diffusers_attn.cli import launch\n"
        f"child = subprocess.Popen([sys.executable, {str(child)!r}])\n"
        "with launch._signals_go_to(child):\n"
        "    sys.exit(child.wait())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < until:
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 143 and (tmp_path / "saved").exists()
    assert launch.launch.__doc__
