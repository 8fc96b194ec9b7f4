"""`benchmarks/context_parallel.py` at a size that CPUs do: what it measures, what fails, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import launching
from .test_quickstart import ROOT

SCRIPT = ROOT / "benchmarks" / "context_parallel.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "new" / "report.json"
    strategies = ["single", "diffusers-ulysses", "diffusers-ring", "ulysses", "gather", "auto"]
    options = ["--device", "cpu", "--tiny", "--models", "wan", "--strategies", *strategies, "--steps", "2"]
    done = launching.run_ranks(2, SCRIPT, *options, "--extra", "ring:_native_math", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_every_variant_is_measured_or_says_why_not(report: Path) -> None:
    results = {each["strategy"]: each for each in json.loads(report.read_text())["results"]}
    assert "log-sum-exp" in (error := results.pop("diffusers-ring")["error"]) or "return_lse" in error
    assert list(results) == ["single", "diffusers-ulysses", "ulysses", "gather", "auto", "ring"]
    for name, result in results.items():
        assert len(result["steps"]) == 6 and result["ms"] > 0, name  # two steps in each of three rounds
        assert max(result["relative_error"]) < 1e-5, name
    assert max(results["ring"]["relative_error"]) > 0.0  # it is not the single model again
    assert "on 2 ranks" in results["auto"]["note"]
    assert [file.name for file in report.parent.iterdir()] == [report.name]


@pytest.mark.slow
def test_the_report_prints_as_tables(report: Path) -> None:
    done = launching.run_ranks(1, SCRIPT, "--markdown", report)
    assert "| ring | `_native_math` | " in done.stdout
    assert "- tiny Wan, diffusers-ring, native: ValueError" in done.stdout
