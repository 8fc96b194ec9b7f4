"""`benchmarks/sharded_weights.py` at a size that CPUs do: what it measures, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import launching
from .documents import ROOT

SCRIPT = ROOT / "benchmarks" / "sharded_weights.py"


@pytest.mark.slow
def test_sharded_beside_split(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = launching.run_ranks(2, SCRIPT, "--device", "cpu", "--tiny", "--steps", "2", "--output", output)
    assert done.returncode == 0, done.stderr
    load, split, sharded = json.loads(output.read_text())["results"]
    assert "weights of WanTransformer3DModel in 1/2 per rank" in load["report"]
    assert len(split["steps"]) == len(sharded["steps"]) == 4
    assert max(sharded["relative_error"]) < 1e-5
    table = launching.run_ranks(1, SCRIPT, "--markdown", output).stdout
    assert "| sharded | " in table and "per step; expected" in table
