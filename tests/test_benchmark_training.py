"""`benchmarks/training.py` at a size that CPUs do: what it measures, what fails, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import launching
from .test_quickstart import ROOT

SCRIPT = ROOT / "benchmarks" / "training.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "new" / "report.json"
    options = ["--device", "cpu", "--size", "tiny", "--rank", "4", "--warm_up", "1", "--rounds", "2"]
    done = launching.run_ranks(2, SCRIPT, *options, "--extra", "ring:_native_math:eager", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_every_variant_is_measured_or_says_why_not(report: Path) -> None:
    read = json.loads(report.read_text())
    results = {(each["strategy"], each["provider"]): each for each in read["results"]}
    assert "return_lse" in results.pop(("diffusers-ring", "native"))["error"]
    assert [name for name, _ in results] == ["single", "diffusers-ulysses", "gather", "ulysses", "ring", "ring"]
    for name, result in results.items():
        assert len(result["steps"]) == 4 and 0 < result["fastest"] <= result["seconds"], name  # two in each round
        assert result["ranks"] == (1 if name[0] == "single" else 2)
    assert [file.name for file in report.parent.iterdir()] == [report.name]


@pytest.mark.slow
def test_all_variants_take_the_same_first_step(report: Path) -> None:
    """Also diffusers' own, whose gradients are half as large as they should be before they are scaled."""
    read = json.loads(report.read_text())
    for result in read["results"]:
        if "error" not in result:
            assert result["loss"] == pytest.approx([read["environment"]["loss"]] * 2, rel=1e-5)
            assert result["gradient_norm"] == pytest.approx([read["environment"]["gradient_norm"]] * 2, rel=1e-5)
            assert max(result["gradient_error"]) < 1e-5, result["strategy"]
    ring = read["results"][-1]
    assert max(ring["gradient_error"]) > 0.0  # it is not the single model again


@pytest.mark.slow
def test_the_report_prints_as_a_table(report: Path) -> None:
    done = launching.run_ranks(1, SCRIPT, "--markdown", report)
    assert "| ring | `_native_math` | eager | " in done.stdout
    assert "- diffusers-ring, native, eager: ValueError" in done.stdout
    assert "- gather, `native`: context parallelism: WanTransformer3DModel on 2 ranks" in done.stdout


@pytest.mark.slow
def test_what_the_time_does_not_allow_is_not_started(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--device", "cpu", "--size", "tiny", "--strategies", "single", "--seconds", "0.001", "--output", path]
    done = launching.run_ranks(1, SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["results"][0]["error"] == "not started: --seconds 0.001 were over"
