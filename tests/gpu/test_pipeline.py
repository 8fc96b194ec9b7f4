"""The three lines of the README, with every provider, on the pipeline that the project ships."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch.utils.checkpoint import checkpoint

from diffusers_attn import DispatchProcessor, attention_provider, set_attention_provider
from diffusers_attn.dispatch import attend
from diffusers_attn.providers.aten_kernels import Math
from diffusers_attn.providers.catalog import SPECS

from .cases import build_lacks, providers

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "examples" / "tiny_flux"
HEAD_DIM = 24


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.bfloat16, local_files_only=True).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    shape = {"height": 64, "width": 64, "max_sequence_length": 32}
    generator = torch.Generator().manual_seed(0)
    prompts = ["a cat", "a rocket"]
    return pipe(prompts, num_inference_steps=8, generator=generator, output_type="pt", **shape).images.float()


@pytest.mark.parametrize("provider", providers())
def test_it_draws_the_same_pictures(provider, pipe, record):
    if build_lacks(provider, HEAD_DIM):
        pytest.skip(f"{provider}: this build of flash-attn lacks head_dim {HEAD_DIM}")
    set_attention_provider(pipe, None)
    expected = draw(pipe)
    set_attention_provider(pipe, provider)
    found = draw(pipe)
    exact = SPECS[provider].capabilities.exact
    record(provider, "pixels, mean of 8 steps", (found - expected).abs().mean().item(), 5e-3 if exact else 3e-2)
    pipe.transformer.set_attn_processor(DispatchProcessor())  # whatever the scope says
    with attention_provider(provider):
        assert torch.equal(draw(pipe), found)
    set_attention_provider(pipe, None)
    assert torch.equal(draw(pipe), expected)


def test_a_forward_recomputed_in_autograds_thread_takes_the_same_provider(monkeypatch):
    calls = []
    attention = inspect.getattr_static(Math, "attention").__func__
    counting = classmethod(lambda cls, *tensors, **rest: calls.append(1) or attention(cls, *tensors, **rest))
    monkeypatch.setattr(Math, "attention", counting)
    query = torch.randn(1, 3, 2, 8, device="cuda", requires_grad=True)
    with attention_provider("_native_math"):
        checkpoint(attend, query, query, query, layout="bshd", use_reentrant=False).sum().backward()
    assert len(calls) == 2
