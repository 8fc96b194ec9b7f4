"""`benchmarks/trainers.py` at a size that CPUs do, without diffusers' script, which is not part of its package."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from .documents import ROOT

SCRIPT = ROOT / "benchmarks" / "trainers.py"


@pytest.mark.slow
def test_jobs_are_timed_and_a_missing_script_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    path, failing = tmp_path / "results.json", tmp_path / "fails.py"
    failing.write_text("raise SystemExit('no such setting')")
    arguments = ["--tiny", "--device", "cpu", "--measured", "5", "--warm_up", "1", "--rounds", "1"]
    arguments += ["--variants", "ours", "diffusers", "--diffusers_script", str(failing)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--output", str(path)])
    runpy.run_path(str(SCRIPT))["main"]()
    ours, other = json.loads(path.read_text())["turns"]
    assert len(ours["seconds"]) == 4 and ours["losses"]
    assert other["error"].splitlines()[-1] == "no such setting"
    assert "| ours | " in capsys.readouterr().out
