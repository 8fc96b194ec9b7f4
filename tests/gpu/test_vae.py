"""VAEs split by rows over NCCL: results of one GPU in float64, and memory for activations in bfloat16."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from diffusers_attn import split_vae, unsplit_vae

from ..vae.cases import CASES
from ..vae.test_models import both, build
from ..vae.test_split import rounded
from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS


def compare(meshes, name, two_axes=False):
    vae, *given = build(CASES[name])
    vae, given = vae.cuda(), [each.cuda() for each in given]
    options = {key: each.cuda() if torch.is_tensor(each) else each for key, each in CASES[name].options.items()}
    *expected, _ = both(vae, *given, **options)
    mesh = init_device_mesh("cuda", (2, SIZE // 2), mesh_dim_names=("ring", "ulysses")) if two_axes else None
    split_vae(vae, mesh)
    *found, splits = both(vae, *given, **options)
    unsplit_vae(vae)
    assert splits > 0
    return [((one - other).abs().max() / one.abs().max()).item() for one, other in zip(expected, found)]


@pytest.mark.parametrize("name", CASES)
def test_as_on_one_gpu(gpus, name):
    for errors in gpus.run(SIZE, compare, name=name):
        assert max(errors) <= 1e-10


@pytest.mark.skipif(SIZE < 4, reason=f"needs four CUDA devices; PyTorch sees {SIZE}")
def test_two_axes(gpus):
    for errors in gpus.run(SIZE, compare, name="wan", two_axes=True):
        assert max(errors) <= 1e-10


def rounded_on_gpus(meshes, name):
    return rounded(None, name, device="cuda")


@pytest.mark.parametrize("name", ["kl", "hunyuan", "cogvideox", "dc"])
def test_bfloat16_is_as_exact_as_on_one_gpu(gpus, name):
    """Norms add means and variances over the ranks in float32."""
    for one, split in gpus.run(SIZE, rounded_on_gpus, name=name):
        assert split <= 1.1 * one


@torch.no_grad()
def peaks(meshes):
    """Bytes for activations of a decoding, replicated and split, and the error of the latter."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan().to("cuda", torch.bfloat16).eval()
    latents = torch.randn(1, 16, 3, 60, 104, device="cuda", dtype=torch.bfloat16)
    found, outs = [], []
    for split in (False, True):
        if split:
            split_vae(vae)
        vae.decode(latents)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outs.append(vae.decode(latents).sample)
        found.append(torch.cuda.max_memory_allocated() - before)
        outs[-1] = outs[-1].cpu()
    unsplit_vae(vae)
    return found, ((outs[0] - outs[1]).float().norm() / outs[0].float().norm()).item()


def test_wan_decodes_with_a_share_of_the_memory(gpus):
    for (replicated, split), error in gpus.run(SIZE, peaks):
        assert split <= 0.6 * replicated
        assert error < 0.02
