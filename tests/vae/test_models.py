"""VAEs of diffusers, split by rows over two and three ranks, against one process: in float64, to 1e-10."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from diffusers_attn import split_vae, unsplit_vae
from diffusers_attn.tiny_models.weights import randomize
from diffusers_attn.vae.row_split import RowSplit
from diffusers_attn.vae.split import VIDEO_VAES

from .cases import CASES


class Double(TorchFunctionMode):
    """Computes in float64 what a model converts to float32, as some norms do. Counts operations on split tensors."""

    def __init__(self):
        super().__init__()
        self.splits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.splits += any(isinstance(each, RowSplit) for each in args)
        if func is torch.Tensor.float:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def build(case):
    torch.manual_seed(0)
    vae = case.make().double().eval()
    randomize(vae, torch.Generator().manual_seed(0))
    return vae, torch.randn(case.sample, dtype=torch.float64), torch.randn(case.latents, dtype=torch.float64)


def encoded(vae, sample):
    out = vae.encode(sample)
    if hasattr(out, "latent_dist"):
        return out.latent_dist.parameters
    return out.latents if hasattr(out, "latents") else out.latent


def both(vae, sample, latents, **options):
    torch.manual_seed(0)  # LTX draws noise while it decodes
    with torch.no_grad(), Double() as counted:
        return encoded(vae, sample), vae.decode(latents, return_dict=False, **options)[0], counted.splits


def compare(meshes, name, size, change=None):
    """Errors of encoding and decoding on this rank, relative to the largest value."""
    vae, sample, latents = build(CASES[name])
    if change is not None:
        change(vae)
    *expected, splits = both(vae, sample, latents, **CASES[name].options)
    assert splits == 0
    split_vae(vae, meshes.lines[size])
    *found, splits = both(vae, sample, latents, **CASES[name].options)
    assert splits > 0
    unsplit_vae(vae)
    assert "forward" not in vars(vae.encoder) and "forward" not in vars(vae.decoder)
    for one, other in zip(expected, found):
        assert type(other) is torch.Tensor and one.shape == other.shape
    return [((one - other).abs().max() / one.abs().max()).item() for one, other in zip(expected, found)]


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(pool, name, ranks):
    for errors in pool.run(ranks, compare, name=name, size=ranks):
        assert max(errors) <= 1e-10


def test_all_vaes_that_auto_splits_are_among_them():
    assert set(VIDEO_VAES) <= {type(case.make()).__name__ for case in CASES.values()}


@pytest.mark.parametrize(("height", "size"), [(2, 3), (1, 2)])
def test_fewer_rows_than_ranks(pool, height, size):
    """Two rows keep two of three ranks at work; one row is computed by all of them."""
    for error in pool.run(size, low, height=height, size=size):
        assert error <= 1e-10


def low(meshes, height, size):
    vae, _, latents = build(CASES["kl"])
    latents = latents[:, :, :height]
    with torch.no_grad():
        expected = vae.decode(latents).sample
        split_vae(vae, meshes.lines[size])
        return (vae.decode(latents).sample - expected).abs().max().item()


@pytest.mark.parametrize("name", ["kl", "wan", "tiny"])
def test_heights_that_are_no_multiple_of_a_row_of_latents(pool, name):
    for error in pool.run(3, odd, name=name):
        assert error <= 1e-10


def odd(meshes, name):
    vae, sample, _ = build(CASES[name])
    sample = sample[..., :25, :]
    with torch.no_grad():
        expected = encoded(vae, sample)
        split_vae(vae, meshes.lines[3])
        return (encoded(vae, sample) - expected).abs().max().item()


def tiles(vae):
    vae.enable_tiling()
    for name in ("tile_sample_min_height", "tile_sample_min_width"):
        setattr(vae, name, 16)
    for name in ("tile_sample_stride_height", "tile_sample_stride_width"):
        setattr(vae, name, 12)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 4


def slices(vae):
    vae.enable_slicing()


@pytest.mark.parametrize(
    ("name", "change"),
    [("wan", tiles), ("kl", tiles), ("hunyuan15", tiles), ("kl", slices)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_tiles_and_slices_are_split_and_blended(pool, name, change):
    for errors in pool.run(2, compare, name=name, size=2, change=change):
        assert max(errors) <= 1e-10
