"""`compare_outputs`: numbers by their definitions, every form of image and video, and the picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_attn.quality.metrics as metrics
from diffusers_attn import AttentionProviderError, compare_outputs
from diffusers_attn.quality.sheet import factor_of, sheet


def pair(seed: int, height: int, width: int, amplitude: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    one = generator.random((height, width, 3))
    return one, (one + amplitude * generator.standard_normal(one.shape)).clip(0, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),  # of scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
    [  # use_sample_covariance=False, data_range=1, channel_axis=-1)
        ((0, 17, 23, 0.1), 0.9336429825511798),
        ((1, 64, 48, 0.5), 0.4570486599085147),
        ((2, 11, 11, 0.02), 0.9980805417262175),
        ((3, 40, 90, 0.001), 0.9999940871802151),
    ],
)
def test_ssim_is_that_of_scikit_image(arguments, expected):
    assert metrics.ssim(*pair(*arguments)) == pytest.approx(expected, abs=1e-9)


def test_numbers_of_a_video():
    one = np.full((3, 16, 12, 3), 0.5)
    other = one.copy()
    other[1] += 0.1
    other[2, :, :6] -= 0.01
    found = compare_outputs(one, other, use_lpips=False)
    assert found.frames == 3 and found.worst_frame == 1 and found.worst_psnr == pytest.approx(20.0)
    mean_square = (0.01 + 0.5 * 1e-4) / 3
    assert found.psnr == pytest.approx(-10 * math.log10(mean_square))
    assert found.relative_error == pytest.approx(math.sqrt(mean_square) / 0.5)
    assert found.max_difference == pytest.approx(0.1) and found.mean_difference == pytest.approx(0.105 / 3)
    assert str(found).startswith("PSNR 24.7") and "at most 25.5 of 255 levels; worst in frame 1: 20.0 dB" in str(found)
    same = compare_outputs(one, one, use_lpips=False)
    assert same.psnr == math.inf and same.ssim == 1.0 and str(same) == "equal in all 3 frames"


def test_forms(tmp_path):
    """One video in every form."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in frames]
    for number, each in enumerate(pictures):
        each.save(tmp_path / f"{number}.png")
    tensor = torch.from_numpy(frames / 255)
    forms = [
        pictures, list(frames), frames / 255, tensor, tensor.movedim(-1, 1).float(), tensor.movedim(-1, 0)[None],
        [list(pictures)], tmp_path, [str(tmp_path / "0.png"), tmp_path / "1.png"],
        torch.cat([tensor, tensor[..., :1]], dim=-1),  # an opacity, which does not count
    ]  # fmt: skip
    for form in forms:
        assert compare_outputs(frames, form, use_lpips=False).max_difference < 1e-6
    grey = frames[0, ..., 0]
    assert compare_outputs(pictures[0].getchannel(0), grey, use_lpips=False).psnr == math.inf


def test_a_video_file(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="reading videos needs imageio and imageio-ffmpeg")
    from diffusers.utils import export_to_video

    frames = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((1, 32, 48, 3))
    export_to_video(list(frames), str(tmp_path / "video.mp4"), fps=8)
    found = compare_outputs(frames, tmp_path / "video.mp4", use_lpips=False)
    assert found.frames == 5 and 30 < found.psnr < math.inf


def test_the_picture(tmp_path):
    one, other = np.zeros((20, 30, 3)), np.zeros((20, 30, 3))
    other[:, 15:] = 0.01
    path = tmp_path / "new" / "compare.png"
    compare_outputs(one, other, save=path, names=("exact", "lossy"), title="a cat", use_lpips=False)
    drawn = np.asarray(Image.open(path).convert("L"))
    scale, line, factor = 13, 28, 64
    left = line + 2 * (30 * scale + line)
    difference = drawn[2 * line : 2 * line + 20 * scale, left : left + 30 * scale]
    assert (difference[:, : 15 * scale - 60] == 0).all()
    assert abs(difference[:, 15 * scale + 60 :] - 255 * 0.01 * factor).max() <= 1  # enlarged by a power of two
    assert [file.name for file in path.parent.iterdir()] == ["compare.png"]
    assert [factor_of(each) for each in (0.0, 1.0, 0.6, 0.5, 0.1, 1e-3)] == [1, 1, 1, 2, 8, 512]


@pytest.mark.parametrize("size", [(64, 64), (90, 160), (512, 384), (12, 640)])
def test_pictures_are_whole(size):
    """Whatever their size is, and the title is as wide as there is room."""
    zeros = np.zeros((*size, 3))
    drawn = np.asarray(sheet([("", zeros, zeros)], ("one", "other"), "“a cat, " + "very " * 60 + "large”").convert("L"))
    scale = max(1, -(-384 // max(size)))
    assert (drawn == 0).sum() >= 3 * size[0] * size[1] * scale**2  # all three, black
    assert (drawn[:, :8] == 255).all() and (drawn[:, -8:] == 255).all() and (drawn[-8:] == 255).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.zeros((16, 18, 3)), "a has 1 frame of 16 x 16 (height x width) and b 1 frame of 16 x 18"),
        (np.zeros((2, 16, 16, 3)), "and b 2 frames"),
        (np.zeros((16, 16, 5)), "b has shape [16, 16, 5]; accepted are"),
        (np.full((16, 16, 3), -0.5), "values from -0.5 to 0; floats from 0 to 1"),
        (np.full((16, 16, 3), np.nan), "values from nan"),
        (np.zeros((16, 16, 3), dtype=np.int64), "b has dtype int64"),
        ("nothing.png", "there is no such file"),
        (7, "b is a int; accepted are PIL images"),
        ([], "b has frames of these heights and widths: none"),
    ],
)
def test_what_is_refused(other, message):
    with pytest.raises(AttentionProviderError) as error:
        compare_outputs(np.zeros((16, 16, 3)), other)
    assert message in str(error.value)


def test_further_refusals(tmp_path):
    zeros = np.zeros((16, 16, 3))
    with pytest.raises(AttentionProviderError, match="the name of a picture is accepted"):
        compare_outputs(zeros, zeros, save=tmp_path / "compare.pdf")
    with pytest.raises(AttentionProviderError, match="SSIM needs 11 pixels"):
        compare_outputs(zeros[:8], zeros[:8])
    with pytest.raises(AttentionProviderError, match="which has no pictures"):
        compare_outputs(zeros, Path(tmp_path))
    if not metrics.lpips_is_installed():
        with pytest.raises(AttentionProviderError, match="`pip install lpips`"):
            compare_outputs(zeros, zeros, use_lpips=True)
