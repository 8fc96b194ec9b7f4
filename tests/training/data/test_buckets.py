"""Sizes of buckets, and examples resized to them."""

import math

import pytest
import torch

from diffusers_attn.training.data import Bucket, Buckets, Example, FramePicking, TrainingDataError
from diffusers_attn.training.data.resize_crop import resize_crop


def example(width=1000, height=1000, frames=1, fps=None):
    return Example("x", "x", "image" if frames == 1 else "video", width, height, frames, fps, None)


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("area", [256 * 256, 832 * 480, 1024 * 1024])
def test_sizes_are_of_the_area_and_multiple(area, multiple):
    buckets = Buckets.of(area, multiple=multiple)
    assert len(buckets.sizes) >= 9
    for height, width in buckets.sizes:
        assert height % multiple == width % multiple == 0
        assert abs(math.log(height * width / area)) < 0.18
    assert {(width, height) for height, width in buckets.sizes} == set(buckets.sizes)


@pytest.mark.parametrize(
    "size, expected",
    [((1000, 1000), (512, 512)), ((1920, 1080), (384, 688)), ((1080, 1920), (688, 384)), ((4000, 900), (368, 736))],
)
def test_nearest_aspect(size, expected):
    assert Buckets.of(512 * 512).bucket(example(*size)) == (1, *expected)


def test_smaller_area_instead_of_enlarging():
    buckets = Buckets.of((512 * 512, 256 * 256), aspects=(1.0,), max_upscale=1.0)
    assert buckets.bucket(example(512, 600)) == (1, 512, 512)
    assert buckets.bucket(example(511, 600)) == (1, 256, 256)
    with pytest.raises(
        TrainingDataError, match="200x600 pixels would have to be enlarged 1.28 times.*max_upscale is 1"
    ):
        buckets.bucket(example(200, 600))
    assert Buckets.of(256 * 256, aspects=(1.0,), max_upscale=1.3).bucket(example(200, 600)) == (1, 256, 256)


def test_frames():
    buckets = Buckets.of(512 * 512, frames=(1, 17, 33), frame_rule=(4, 1))
    assert buckets.bucket(example()).frames == 1
    assert buckets.bucket(example(frames=32)).frames == 17
    assert buckets.bucket(example(frames=300)).frames == 33
    with pytest.raises(TrainingDataError, match="it has 16 usable frames, but buckets have 1, 17, 33 frames"):
        buckets.bucket(example(frames=16))
    with pytest.raises(TrainingDataError, match="a video, but buckets have single frames"):
        Buckets.of(512 * 512).bucket(example(frames=16))
    with pytest.raises(TrainingDataError, match="an image, but buckets have 17 frames"):
        Buckets.of(512 * 512, frames=(17,)).bucket(example())
    with pytest.raises(TrainingDataError, match="frames=16: the model accepts 4n \\+ 1 frames, such as 13 or 17"):
        Buckets.of(512 * 512, frames=(16,), frame_rule=(4, 1))


def test_picking():
    assert FramePicking().numbers(10, None, 4) == [3, 4, 5, 6]
    assert FramePicking(pick="spread").numbers(10, None, 4) == [0, 3, 6, 9]
    half = FramePicking(fps=12)
    assert half.usable(25, 24.0) == 13
    assert half.numbers(25, 24.0, 13) == list(range(0, 25, 2))
    assert half.numbers(25, 24.0, 3) == [10, 12, 14]
    double = FramePicking(fps=48).numbers(5, 24.0, 9)
    assert double == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    ntsc = FramePicking(fps=16)
    for frames in range(1, 200):
        numbers = ntsc.numbers(frames, 30000 / 1001, ntsc.usable(frames, 30000 / 1001))
        assert numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] < frames
    with pytest.raises(TrainingDataError, match="its frame rate is unknown"):
        half.usable(25, None)
    with pytest.raises(TrainingDataError, match="it has 13 usable frames at 12 per second, but 14 are needed"):
        half.numbers(25, 24.0, 14)
    with pytest.raises(TrainingDataError, match="pick='spread'.*fps=8"):
        FramePicking(fps=8, pick="spread")


def test_fit_covers_and_crops_the_middle():
    ramp = torch.arange(200.0).div(200 / 255).byte().expand(3, 100, 200)
    pixels = resize_crop([ramp], Bucket(1, 50, 50))
    assert pixels.shape == (1, 3, 50, 50) and pixels.dtype == torch.float32
    # The middle half of the ramp, with even steps: nothing is squeezed.
    assert pixels[0, 0, 10, [0, 24, 49]].tolist() == pytest.approx([-0.49, -0.01, 0.49], abs=0.02)
    same = resize_crop([ramp], Bucket(1, 100, 200))
    assert torch.equal(((same + 1) * 127.5).round().byte()[0], ramp)
    assert same.min() >= -1 and same.max() <= 1


def test_fine_patterns_become_grey_where_they_are_made_small():
    board = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2).mul(255).byte().expand(3, 128, 128)
    assert resize_crop([board], Bucket(1, 24, 24)).abs().max() < 0.1


def test_random_crops_are_the_seeds():
    frame = torch.arange(200).byte().expand(3, 20, 200)
    first = {resize_crop([frame, frame], Bucket(2, 20, 20), crop="random", seed=seed)[:, 0, 0, 0] for seed in range(5)}
    lefts = [round((each[0].item() + 1) * 127.5) for each in first]
    assert len(set(lefts)) > 1 and all(0 <= left <= 180 for left in lefts)
    assert all(each[0] == each[1] for each in first)
    again = [resize_crop([frame], Bucket(1, 20, 20), crop="random", seed=3) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(TrainingDataError, match="crop='left': accepted are 'centre', 'random'"):
        resize_crop([frame], Bucket(1, 20, 20), crop="left")
