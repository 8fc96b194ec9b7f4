"""`benchmarks/vae.py` at a size that CPUs do."""

from __future__ import annotations

import json
from pathlib import Path

from . import launching
from .test_quickstart import ROOT


def test_whole_and_split_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--device", "cpu", "--tiny", "--calls", "decode", "encode", "--dtype", "float32", "--repeat", "1"]
    done = launching.run_ranks(2, ROOT / "benchmarks" / "vae.py", *options, "--output", path)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    assert [(each["call"], each["variant"]) for each in results] == [
        (call, variant) for call in ("decode", "encode") for variant in ("whole", "split")
    ]
    for each in results:
        assert each["ms"] > 0 and len(each["calls"]) == 3 and max(each["relative_error"]) < 1e-5
    assert "| tiny Wan VAE, float32 | decode | split |" in done.stdout
