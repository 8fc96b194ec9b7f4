"""`profile` on a GPU: kernels are found in eager mode, in compiled blocks and in CUDA graphs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from diffusers_attn import apply_compile, cuda_graphs_status, profile, remove_cuda_graphs, set_attention_provider

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "examples" / "tiny_flux"
CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 32, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.bfloat16, local_files_only=True).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured(pipe, **settings):
    with profile(pipe, **settings) as report:
        pipe("a cat", **CALL)
    assert sum(each.seconds for each in report.parts) == pytest.approx(report.seconds, rel=1e-6)
    return report


def test_eager_compiled_and_in_a_graph(pipe):
    original = pipe.transformer
    pipe.transformer = copy.deepcopy(original)
    try:
        set_attention_provider(pipe, "native")
        pipe("a cat", **CALL)
        report = measured(pipe)
        eager = {(each.component, each.provider) for each in report.parts if each.kind == "attention"}
        assert ("transformer", "native") in eager and "waiting for the host" in report.by("kind")
        apply_compile(pipe.transformer, cuda_graphs="auto")
        pipe("a cat", **CALL)
        before = cuda_graphs_status(pipe.transformer)
        report = measured(pipe)
        after = cuda_graphs_status(pipe.transformer)
        assert after.recorded == before.recorded == 1 and after.replays == before.replays + 4  # nothing recorded anew
        assert "CUDA graphs launched" in str(report) and report.by("kind")["attention"] > 0
        report = measured(pipe, cuda_graphs=False)
        assert "ran without CUDA graphs" in str(report) and "CUDA graphs launched" not in str(report)
        assert cuda_graphs_status(pipe.transformer).replays == after.replays
    finally:
        remove_cuda_graphs(pipe.transformer)
        pipe.transformer = original
