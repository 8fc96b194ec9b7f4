"""Images and videos with missing or zeroed parts, which decoders accept, are reported as bad data."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusers_attn.training.data import decode
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.source import FileSource

from .media import cut, video, video_at

PICTURES = {
    "standard.jpg": {},
    "fine.jpg": {"quality": 95, "subsampling": 0},
    "optimised.jpg": {"optimize": True},
    "progressive.jpg": {"progressive": True},
    "restarts.jpg": {"restart_marker_blocks": 8},
    "a.png": {},
    "a.webp": {},
    "lossless.webp": {"lossless": True},
    "a.avif": {},
    "a.bmp": {},
    "raw.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
}


def noisy(path, flat=False, **options):
    generator = np.random.default_rng(0)
    coarse = np.kron(generator.integers(20, 230, (8, 8, 3)), np.ones((16, 16, 1)))
    pixels = np.full((128, 128, 3), 240) if flat else coarse + generator.integers(0, 25, (128, 128, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize("name", PICTURES)
def test_second_half_of_a_picture_is_zeros(tmp_path, name):
    for flat in (False, True):  # of which zeros are a part that has a meaning
        path = noisy(tmp_path / name, flat, **PICTURES[name])
        assert decode.read_image(FileSource(path)).shape == (3, 128, 128)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        with pytest.raises(TrainingDataError, match="a broken image: "):
            decode.read_image(FileSource(path))


@pytest.mark.parametrize("name", ["standard.jpg", "fine.jpg", "a.png", "a.webp", "a.avif"])
def test_zeros_in_the_middle_of_a_picture(tmp_path, name):
    path = noisy(tmp_path / name, **PICTURES[name])
    data = bytearray(path.read_bytes())
    start, end = len(data) // 2, len(data) * 3 // 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(TrainingDataError, match="zeros|broken PNG file"):
        decode.read_image(FileSource(path))


def test_one_wrong_bit_of_a_png(tmp_path):
    path = noisy(tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrainingDataError, match="broken PNG file .*IDAT"):
        decode.read_image(FileSource(path))


def test_bytes_behind_the_end_are_no_damage(tmp_path):
    """Cameras append views and notes to JPEGs, and some file systems zeros."""
    path = noisy(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"note" + bytes(1000))
    assert decode.read_image(FileSource(path)).shape == (3, 128, 128)


def test_dark_pictures_are_no_damage(tmp_path):
    """A bar below, and a thing before black."""
    for name in ("a.bmp", "a.tif"):
        pixels = np.full((64, 64, 3), 90, np.uint8)
        pixels[40:] = 0
        Image.fromarray(pixels).save(tmp_path / name)
        assert decode.read_image(FileSource(tmp_path / name))[:, 50:].max() == 0
        pixels[:] = 0
        pixels[10:30, 20:40] = 200
        Image.fromarray(pixels).save(tmp_path / name)
        decode.read_image(FileSource(tmp_path / name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0, 70000.0])
def test_floats_that_are_no_picture(tmp_path, value):
    pixels = np.full((8, 8), 0.5, np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert decode.read_image(FileSource(tmp_path / "a.tif")).unique().tolist() == [128]
    pixels[3, 3] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(TrainingDataError, match="a broken image: it has NaN or infinity|its values go from"):
        decode.read_image(FileSource(tmp_path / "a.tif"))


def test_pictures_with_several_frames(tmp_path):
    frames = [Image.new("RGB", (16, 16), (i * 60, 0, 0)) for i in range(4)]
    for name in ("a.webp", "a.png", "a.tif", "a.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert decode.probe_image(FileSource(tmp_path / "a.gif")).frames == 4
    for name in ("a.webp", "a.png", "a.tif"):
        with pytest.raises(TrainingDataError, match="it has 4 frames or pages, but an image has one"):
            decode.probe_image(FileSource(tmp_path / name))
    frames[0].save(tmp_path / "one.gif")
    assert decode.probe_image(FileSource(tmp_path / "one.gif")).frames == 1


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.webm", {}),
        ("a.mkv", {}),
        ("a.mp4", {"movflags": "faststart"}),
        ("fragments.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mov", {"movflags": "faststart"}),
        ("a.avi", {}),
        ("a.gif", {}),
    ],
)
@pytest.mark.parametrize("share", [0.4, 0.7, 0.99])
def test_videos_that_end_before_their_container_says(tmp_path, name, options, share):
    path = tmp_path / name
    if name.endswith(".gif"):
        frames = [Image.new("RGB", (16, 16), (i * 20, 0, 0)) for i in range(10)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    elif name.endswith(".webm"):
        video_at(path, list(range(0, 3000, 100)), "libvpx-vp9")
    else:
        video(path, frames=30, noise=True, **options)
    assert decode.probe_video(FileSource(path)).frames >= 10
    with pytest.raises(TrainingDataError, match="a broken video: "):
        decode.probe_video(FileSource(cut(path, share)))


def test_a_stream_that_lasts_shorter_than_promised(tmp_path):
    """Its header does not say how many bytes it has, and says how long it lasts."""
    path = video_at(tmp_path / "a.mkv", list(range(0, 3000, 100)))
    data = bytearray(path.read_bytes())
    segment = data.index(b"\x18\x53\x80\x67")
    data[segment + 4 : segment + 12] = b"\x01" + b"\xff" * 7
    path.write_bytes(data)
    assert decode.probe_video(FileSource(path)).frames == 30
    with pytest.raises(TrainingDataError, match=r"its header states [0-9.]+ s, but it ends after"):
        decode.probe_video(FileSource(cut(path, 0.6)))
