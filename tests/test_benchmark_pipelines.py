"""`benchmarks/pipelines.py` and `first_picture.py` at a size that CPUs do: what they measure, and their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import launching
from .documents import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "variants"), [(1, ["diffusers-eager", "ours-eager"]), (2, ["ours-eager"])])
def test_calls_of_a_pipeline(ranks: int, variants: list[str], tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tiny", "--steps", "2", "--rounds", "2", "--variants", *variants]
    done = launching.run_ranks(ranks, ROOT / "benchmarks" / "pipelines.py", *options, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [each["variant"] for each in results] == variants
    for each in results:
        assert len(each["calls_s"]) == 2 and each["difference_in_levels"] < 0.5, each
    if ranks > 1:
        assert "on 2 ranks" in results[0]["note"]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["wan", "qwen-image"])
def test_guidance(pipeline: str, tmp_path: Path) -> None:
    options = ["--pipeline", pipeline, "--device", "cpu", "--tiny", "--steps", "3", "--rounds", "1"]
    options += ["--variants", "ours-alone-eager", "ours-sequences-eager", "ours-eager"]
    done = launching.run_ranks(2, ROOT / "benchmarks" / "pipelines.py", *options, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    for each in json.loads((tmp_path / "out.json").read_text())["results"]:
        assert each["difference_in_levels"] < 0.5, each
        assert ("branches of guidance" in each.get("note", "")) == (each["variant"] == "ours-eager")


@pytest.mark.slow
def test_the_first_picture(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tiny", "--steps", "1", "--variants", "ours-eager", "--warm", "1"]
    script, output = ROOT / "benchmarks" / "first_picture.py", tmp_path / "out.json"
    done = launching.run_ranks(1, script, *options, "--output", output)
    assert done.returncode == 0, done.stderr
    assert [each["cache"] for each in json.loads(output.read_text())["results"]] == ["cold", "warm"]
