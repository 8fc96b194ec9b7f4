"""`benchmarks/quality.py` in few steps: an exact provider changes nothing, and a cache does."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .documents import ROOT


def test_a_provider_and_a_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    monkeypatch.setattr(quality, "captions", lambda: ["a cat"])
    args = argparse.Namespace(
        device="cpu", dtype="float32", steps=5, passes=1, seed=0, commit="none", pictures=tmp_path,
        variants=["native", "TaylorSeer"],
    )  # fmt: skip
    run = quality.measure(args)
    _, exact, cached = run["results"]
    assert exact["psnr"] is None or exact["psnr"] > 100
    assert 10 < cached["psnr"] < 100 and cached["kind"] == "cache"
    assert (tmp_path / "native.png").is_file() and (tmp_path / "TaylorSeer-every-third-step.png").is_file()
    assert "| TaylorSeer, every third step | cache | " in quality.markdown(run)
