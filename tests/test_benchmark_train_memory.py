"""`benchmarks/train_memory.py` at a size that CPUs do: a variant's losses, and what a run leaves behind."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from .documents import ROOT

SCRIPT = ROOT / "benchmarks" / "train_memory.py"


def test_places_of_blocks_give_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    real = script["real_model"]("flux", True, [1, 2])
    made = real.make(torch.device("cpu"))
    assert (len(made.transformer_blocks), len(made.single_transformer_blocks)) == (1, 2)
    made.to(torch.bfloat16).save_pretrained(tmp_path / "transformer")
    found = [
        script["measure"](real, ("to_q",), tmp_path / "transformer", "bf16", place, torch.device("cpu"), 1, 2)
        for place in ("none", "blocks", "disk")
    ]
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    assert len(set(found[0]["loss"])) == 2 and found[0]["seconds"] > 0


@pytest.mark.thorough
def test_a_run_records_its_variants_and_their_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    path = tmp_path / "results.json"
    arguments = ["--tiny", "--device", "cpu", "--steps", "1", "--base_precision", "bf16", "nf4", "--offload", "none"]
    arguments += ["--models", "flux", "qwen-image", "wan-14b-whole"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--output", str(path)])
    runpy.run_path(str(SCRIPT))["main"]()
    report = json.loads(path.read_text())
    measured, refused = report["results"][::2], report["results"][1::2]
    assert [each["model"] for each in measured] == ["tiny Flux", "tiny Qwen-Image", "tiny Wan"]
    assert all(each["base_precision"] == "bf16" and each["seconds"] > 0 for each in measured)
    assert all("No GPU found" in each["error"] for each in refused)  # diffusers quantises to nf4 on GPUs alone
    assert report["environment"]["commit"]
