"""`split_vae` and `enable_context_parallel(split_vae=...)`: what they split, refuse and restore."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from diffusers_attn import (
    AttentionProviderError,
    disable_context_parallel,
    enable_context_parallel,
    set_attention_provider,
    split_vae,
    unsplit_vae,
)
from diffusers_attn.vae.team import Team

from .cases import CASES
from .test_models import build


def error_of(call):
    try:
        return f"no error: {call()}"
    except AttentionProviderError as error:
        return str(error)


def draw(pipe):
    return pipe(
        prompt_embeds=torch.ones(1, 4, 32), negative_prompt_embeds=torch.zeros(1, 4, 32), num_frames=5, height=48,
        width=32, num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def of_pipeline(meshes, **options):
    from ..tiny_pipelines import make

    pipe = make("wan")
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe)
    report = enable_context_parallel(pipe, verbose=False, **options)
    on = ["forward" in vars(half) for half in (pipe.vae.encoder, pipe.vae.decoder)]
    assert not on[0] or Team(vars(pipe.vae.decoder)["forward"].axes, 1).size == 4
    found = draw(pipe)
    disable_context_parallel(pipe)
    off = ["forward" in vars(half) for half in (pipe.vae.encoder, pipe.vae.decoder)]
    return report.split_vaes, str(report), on, off, (found - expected).abs().max().item()


@pytest.mark.parametrize(
    "options",
    [{}, {"inputs": "check"}, {"inputs": "trust", "ulysses_degree": 2, "ring_degree": 2}, {"guidance_degree": 2}],
    ids=str,
)
def test_a_video_pipeline_splits_its_vae(pool, options):
    for vaes, report, on, off, error in pool.run(4, of_pipeline, **options):
        assert vaes == ("vae (AutoencoderKLWan)",)
        assert "images are split by rows in vae (AutoencoderKLWan)" in report
        assert on == [True, True] and off == [False, False]
        assert error < 1e-4


def test_a_pipeline_leaves_its_vae_whole(pool):
    for vaes, report, on, _, _ in pool.run(4, of_pipeline, split_vae=False):
        assert vaes == () and "rows" not in report and on == [False, False]


def of_images(meshes):
    from ..tiny_pipelines import make

    pipe = make("cogview4")
    mesh = meshes.lines[2]
    left = enable_context_parallel(pipe, mesh=mesh, verbose=False).split_vaes
    disable_context_parallel(pipe)
    asked = enable_context_parallel(pipe, mesh=mesh, split_vae=True, verbose=False).split_vaes
    again = error_of(lambda: split_vae(pipe.vae, mesh))
    disable_context_parallel(pipe)
    wrong = [
        error_of(lambda: enable_context_parallel(pipe.transformer, mesh=mesh, split_vae=True)),
        error_of(lambda: enable_context_parallel(pipe, mesh=mesh, split_vae="rows")),
        error_of(lambda: enable_context_parallel(pipe, mesh=mesh, split_vae=1)),
        error_of(lambda: split_vae(pipe.transformer, mesh)),
    ]
    return left, asked, again, wrong


def test_an_image_vae_is_split_if_asked_for(pool):
    for left, asked, again, wrong in pool.run(2, of_images):
        assert left == () and asked == ("vae (AutoencoderKL)",)
        assert "is split by rows already" in again
        assert "split_vae=True" in wrong[0] and "split_vae='rows'" in wrong[1]
        assert "split_vae=1: True, False and 'auto' are accepted" in wrong[2]
        assert "CogView4Transformer2DModel is no VAE" in wrong[3]


def with_gradients(meshes):
    from ..tiny_pipelines import make

    vae, sample, latents = build(CASES["kl"])
    split_vae(vae, meshes.lines[2])
    refused = error_of(lambda: vae.decode(latents))
    vae.requires_grad_(False)
    without = vae.decode(latents).sample.requires_grad
    refused_of_inputs = error_of(lambda: vae.encode(sample.requires_grad_()))
    pipe = make("wan")
    enable_context_parallel(pipe, mesh=meshes.lines[2], verbose=False)
    latents = torch.randn(1, 16, 1, 4, 4, requires_grad=True)
    pipe.vae.decode(latents).sample.sum().backward()
    disable_context_parallel(pipe)
    return refused, without, refused_of_inputs, latents.grad.abs().sum().item()


def test_gradients_are_refused_if_asked_for_and_whole_by_default(pool):
    for refused, without, refused_of_inputs, gradient in pool.run(2, with_gradients):
        assert "decoder of AutoencoderKL is split over ranks, which records no gradients" in refused
        assert not without
        assert "encoder of AutoencoderKL" in refused_of_inputs
        assert gradient > 0


def copies(meshes):
    vae, _, latents = build(CASES["kl"])
    vae.requires_grad_(False)
    expected = vae.decode(latents).sample
    split_vae(vae, meshes.lines[2])
    if meshes.lines[2].get_local_rank() == 0:  # alone: a split copy would wait for the other rank
        for each in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
            assert torch.equal(each.decode(latents).sample, expected)
    wrapped = vae.decoder.forward
    vae.decoder.forward = lambda *given, **named: wrapped(*given, **named)  # as hooks of accelerate are set
    unsplit_vae(vae)
    unsplit_vae(vae)
    return torch.equal(vae.decode(latents).sample, expected)


def test_copies_and_wrapped_modules_are_not_split_any_more(pool):
    assert pool.run(2, copies) == [True, True]


class Rolled(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.roll(1, -2)


def unknown(meshes):
    vae, _, latents = build(CASES["kl"])
    vae.requires_grad_(False).decoder.conv_act = Rolled()
    split_vae(vae, meshes.lines[2])
    return error_of(lambda: vae.decode(latents))


def test_an_unknown_operation_is_an_error_that_names_the_module(pool):
    for error in pool.run(2, unknown):
        assert "aten.roll.default has no rule in Rolled within Decoder" in error


def different(meshes):
    mesh = meshes.lines[2]
    vae, _, latents = build(CASES["kl"])
    vae.requires_grad_(False)
    expected = vae.decode(latents).sample
    split_vae(vae, mesh)
    rank = mesh.get_local_rank()
    values = (vae.decode(latents + rank).sample - expected).abs().max().item()
    return values, error_of(lambda: vae.decode(latents[..., : 5 + rank]))


def test_ranks_with_different_latents(pool):
    """Values are those of the first rank; shapes that differ are an error."""
    for values, error in pool.run(2, different):
        assert values <= 1e-10
        assert "with different inputs. rank 0: decoder of AutoencoderKL of (2, 4, 7, 5)" in error


def compiled(meshes):
    vae, _, latents = build(CASES["kl"])
    vae.requires_grad_(False)
    expected = vae.decode(latents).sample
    split_vae(vae, meshes.lines[2])
    vae.decoder.up_blocks[0].compile(backend="eager", fullgraph=True)
    first = vae.decode(latents).sample
    vae.decoder.compile(backend="eager")
    second = vae.decode(latents).sample
    return [(each - expected).abs().max().item() for each in (first, second)]


def test_compiled_modules_run_without_compilation(pool):
    for errors in pool.run(2, compiled):
        assert max(errors) <= 1e-10


def in_inference_mode(meshes, name):
    vae, _, latents = build(CASES[name])
    with torch.inference_mode():
        expected = vae.decode(latents).sample
        split_vae(vae, meshes.lines[2])
        return (vae.decode(latents).sample - expected).abs().max().item()


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_in_inference_mode(pool, name):
    for error in pool.run(2, in_inference_mode, name=name):
        assert error <= 1e-10


def bound(meshes):
    vae, _, latents = build(CASES["kl"])
    vae.requires_grad_(False)
    expected = vae.decode(latents).sample
    set_attention_provider(vae, "_native_math")
    split_vae(vae, meshes.lines[2])
    return (vae.decode(latents).sample - expected).abs().max().item()


def test_attention_of_a_bound_vae(pool):
    for error in pool.run(2, bound):
        assert error <= 1e-10


@torch.no_grad()
def rounded(meshes, name, device="cpu"):
    """Squared errors of bfloat16 against float64, in one process and split."""
    vae, _, latents = build(CASES[name])
    vae, latents = vae.to(device), latents.to(device)
    exact = vae.decode(latents).sample
    vae.to(torch.bfloat16)
    latents = latents.bfloat16()
    one = vae.decode(latents).sample
    split_vae(vae, None if meshes is None else meshes.lines[2])
    return [(each.double() - exact).square().mean().item() for each in (one, vae.decode(latents).sample)]


@pytest.mark.parametrize("name", ["kl", "hunyuan"])
def test_bfloat16_is_as_exact_as_in_one_process(pool, name):
    for one, split in pool.run(2, rounded, name=name):
        assert split <= 1.1 * one
