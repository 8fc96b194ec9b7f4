"""`benchmarks/train_lora.py` at a size that CPUs do: jobs of `accelerate launch`, what they are compared with, and one
that is killed."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_inference_cp import launch
from .test_quickstart import ROOT

SCRIPT = ROOT / "benchmarks" / "train_lora.py"
TRY_OUT = [sys.executable, SCRIPT, "--tiny", "--device", "cpu", "--rank", "4"]
STEPS = 6


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Runs the script in this process, which starts the jobs. Returns what it printed."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [*map(str, TRY_OUT[1:]), *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPT))["main"]()
    return printed.getvalue()


@pytest.mark.slow
def test_a_job_is_measured_and_what_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    variants = ["--strategies", "one", "--extra", "one:sage", "--steps", "3", "--warm_up", "1"]
    printed = run(monkeypatch, *variants, "--output", path)
    one, sage = json.loads(path.read_text())["results"]
    assert "error" not in one, one["error"]
    assert one["agrees"] and len(one["steps"]) == 3 and one["seconds"] > 0 and one["tensors"] == 2 * 2 * 8
    assert sage["error"].startswith("it ended with 1\n") and "'sage' has no backward" in sage["error"].splitlines()[-1]
    listed = printed[printed.index("- one, sage, eager: it ended with 1\n      ") :]
    assert (
        "\n      train_lora.py: attention provider 'sage'" in listed
    )  # other packages may have printed warnings before
    assert "| one | `native` | eager | 1 | " in printed
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report, and what was printed."""
    path = tmp_path_factory.mktemp("benchmark") / "new" / "report.json"
    done = launch([*TRY_OUT, "--steps", str(STEPS), "--strategies", "one", "gather+resume", "--output", path])
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.fixture(scope="module")
def results(done: tuple[Path, str]) -> list[dict[str, Any]]:
    read = json.loads(done[0].read_text())["results"]
    for result in read:
        assert "error" not in result, result["error"]
    return read


# That what was killed goes on is held by tests/training; this is about the script, which killed and compared.
@pytest.mark.thorough
def test_one_process_and_two_that_were_killed_train_alike(results: list[dict[str, Any]]) -> None:
    one, two = results
    assert [one["processes"], two["processes"]] == [1, 2]
    assert two["resumed_from"] == 3 and two["killed_behind"] in (4, 5)
    for name in ("loss", "gradient_norm"):
        assert len(set(one[name])) == STEPS
        assert two[name] == pytest.approx(one[name], rel=1e-5)
        assert 0.0 < two[f"{name}_error"] < 1e-5  # it is not the same job again
    assert 0.0 < two["adapter_error"] < 1e-3 and two["compared_with"] == "one"
    for result in (one, two):
        assert result["agrees"] and len(result["steps"]) == STEPS and result["seconds"] > 0
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(2 * 45, rel=0.05)
        assert result["tensors"] == 2 * 2 * 8  # A and B, of eight layers in both blocks


@pytest.mark.thorough
def test_latents_are_made_once(results: list[dict[str, Any]]) -> None:
    videos, captions = 3, 3 + 1  # and the empty one
    assert [result["encoded"] for result in results] == [videos + captions, 0]


@pytest.mark.thorough
def test_the_report_prints_as_a_table(done: tuple[Path, str], results: list[dict[str, Any]]) -> None:
    _, printed = done
    assert "| gather+resume | `native` | eager | 2 | " in printed
    assert "went on behind step 3; its adapter is " in printed


def test_what_the_time_does_not_allow_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    run(monkeypatch, "--seconds", "0.001", "--output", path)
    results = json.loads(path.read_text())["results"]
    assert [each["strategy"] for each in results] == ["one", "gather", "gather+resume", "dp", "ulysses"]
    assert {each["error"] for each in results} == {"not started: --seconds 0.001 were over"}
