"""The plugin that binds models, and PyTorch's samples of attention."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ..documents import ROOT
from ..launching import run
from . import sdpa_samples
from .__main__ import FILE, HERE

TESTS = """
import torch
from diffusers import FluxTransformer2DModel

SIZES = dict(num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2, in_channels=4)
SIZES |= dict(joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8])


def test_bound(tmp_path):
    model = FluxTransformer2DModel(**SIZES)
    model.save_pretrained(tmp_path)
    for each in (model, FluxTransformer2DModel.from_pretrained(tmp_path)):
        assert type(each.transformer_blocks[0].attn.processor).__name__ == "FluxAttnProcessor[native]"


def test_failing():
    assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize("provider", [None, "native"])
def test_models_of_other_tests_are_bound(tmp_path: Path, provider):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "test_them.py").write_text(TESTS)
    report = tmp_path / "report.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
        "DIFFUSERS_ATTN_PEERS_REPORT": str(report),
    }
    environment |= {"DIFFUSERS_ATTN_PEERS_BIND": provider} if provider else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bound", "-p", "no:cacheprovider", "theirs/test_them.py"]
    result = run(command, cwd=tmp_path, env=environment)
    found = json.loads(report.read_text())
    assert found["tests"] == {
        "test_them.py::test_bound": "passed" if provider else "failed",
        "test_them.py::test_failing": "failed",
    }, result.stdout
    assert found["bound"] == ({"FluxTransformer2DModel": 2} if provider else {})


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None,
    reason="expecttest, which PyTorch's descriptions of its functions import, is not installed (make test-peers does)",
)
def test_samples_of_pytorch():
    for sample in sdpa_samples.samples(torch.float64):
        assert sdpa_samples.outcome("native", sample) == "passed"


def test_nothing_that_passed_without_fails_with_a_provider():
    recorded = json.loads(FILE.read_text())
    for path, row in recorded["files"].items():
        assert row["with"] >= row["without"] and not row["regressions"], path
        assert row["models bound"] > 0 or not row["without"], path
    for row in recorded["sdpa"].values():
        assert "failed" not in row["counts"] and row["counts"]["passed"] > 0
