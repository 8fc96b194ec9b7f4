"""Pictures and videos into pixels."""

import builtins

import pytest
import torch
from PIL import Image

from diffusers_attn.training.data import decode
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.frames import FramePicking
from diffusers_attn.training.data.source import FileSource

from ... import launching
from .media import cut, picture, video, video_at

RED, GREEN = (255, 0, 0), (0, 255, 0)


def read(path):
    return decode.read_image(FileSource(path))


def test_orientation(tmp_path):
    image = Image.new("RGB", (4, 2), RED)
    image.putpixel((0, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left upper corner becomes the right upper one
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read(tmp_path / "a.png")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 4, 2)
    assert pixels[:, 0, 1].tolist() == list(GREEN)
    assert (pixels == torch.tensor(RED)[:, None, None]).all(0).sum() == 7


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "transparent RGB"])
def test_transparent_parts_are_white(tmp_path, mode):
    if mode == "RGBA":
        image = Image.new("RGBA", (2, 1), (*RED, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
    elif mode == "LA":
        image = Image.new("LA", (2, 1), (76, 255))
        image.putpixel((1, 0), (0, 0))
    else:
        image = Image.new("P", (2, 1), 0)
        image.putpalette([*RED, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
        if mode != "P":
            image = image.convert("RGB")
            image.info["transparency"] = (0, 0, 0)
    image.save(tmp_path / "a.png")
    pixels = read(tmp_path / "a.png")
    assert pixels[:, 0, 1].tolist() == [255, 255, 255]
    assert pixels[:, 0, 0].tolist() == ([76, 76, 76] if mode == "LA" else list(RED))


def test_palettes_greys_and_sixteen_bits(tmp_path):
    image = Image.new("P", (1, 1), 3)
    image.putpalette([0] * 9 + [1, 2, 3])
    image.save(tmp_path / "p.png")
    assert read(tmp_path / "p.png").flatten().tolist() == [1, 2, 3]
    Image.new("L", (1, 1), 7).save(tmp_path / "l.png")
    assert read(tmp_path / "l.png").flatten().tolist() == [7, 7, 7]
    Image.new("I;16", (1, 1), 100 * 257).save(tmp_path / "i.png")
    assert read(tmp_path / "i.png").flatten().tolist() == [100, 100, 100]


def test_broken_picture(tmp_path):
    path = cut(picture(tmp_path / "a.jpg", 256, 256), 0.5)
    assert decode.probe_image(FileSource(path)).width == 256  # its header is whole
    with pytest.raises(TrainingDataError, match="a broken image: "):
        read(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_of_a_video(tmp_path, name):
    source = FileSource(video(tmp_path / name, frames=12, width=64, height=32, fps=8))
    assert decode.probe_video(source) == (64, 32, 12, 8.0, None)
    frames = list(decode.read_video(source, [0, 3, 3, 11]))
    assert {(frame.dtype, frame.shape) for frame in frames} == {(torch.uint8, (3, 32, 64))}
    blue = [frame[2, 16:, 32:].float().mean().item() for frame in frames]
    assert blue == pytest.approx([0, 60, 60, 220], abs=6)
    assert (frames[0][:, 2, 2].int() - torch.tensor(RED)).abs().max() < 12


@pytest.mark.parametrize("name, codec", [("a.mp4", "mpeg4"), ("b.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_frames_of_a_variable_rate_are_picked_by_time(tmp_path, name, codec):
    """One second with a frame every 20 ms, three with one every 200: by number, 10 per second would be too fast in one
    part and too slow in the other."""
    times = [*range(0, 1000, 20), *range(1000, 4000, 200)]
    media = decode.probe_video(FileSource(video_at(tmp_path / name, times, codec)))
    assert (media.frames, media.times) == (65, pytest.approx([each / 1000 for each in times], abs=1.1e-3))
    assert media.fps == pytest.approx(64 / 3.8, rel=1e-3)
    picking = FramePicking(fps=10)
    assert picking.usable(media.frames, media.fps, media.times) == 39
    picked = [times[number] for number in picking.numbers(media.frames, media.fps, 39, media.times)]
    assert picked[:11] == list(range(0, 1001, 100))
    assert all(abs(time - 100 * i) <= 100 for i, time in enumerate(picked))
    # Its own rate, and all of it, are by time as well.
    own = [times[each] for each in FramePicking().numbers(media.frames, media.fps, 65, media.times)]
    assert all(abs(time - 3800 / 64 * i) <= 100 for i, time in enumerate(own))
    spread = FramePicking(pick="spread").numbers(media.frames, media.fps, 5, media.times)
    assert [times[each] for each in spread] == [0, 940, 1800, 2800, 3800]
    blue = [frame[2].float().mean().item() for frame in decode.read_video(FileSource(tmp_path / name), [0, 10, 20])]
    assert blue == pytest.approx([0, 100, 200], abs=16)


def test_turned_video(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()

    video(tmp_path / "a.mp4", width=64, height=32)
    turn = ["-display_rotation", "90", "-i", str(tmp_path / "a.mp4"), "-c", "copy", str(tmp_path / "b.mp4")]
    launching.run([ffmpeg, "-loglevel", "error", *turn], check=True)
    source = FileSource(tmp_path / "b.mp4")
    assert decode.probe_video(source)[:2] == (32, 64)
    (frame,) = decode.read_video(source, [5])
    assert frame.shape == (3, 64, 32)
    # Turned against the clock: the red corner is at the left, below.
    assert frame[0, -3, 3] > 200 and frame[0, 3, 3] < 50


def test_broken_videos(tmp_path):
    complete = video(tmp_path / "a.mp4", frames=100, movflags="faststart")
    with pytest.raises(TrainingDataError, match="a broken video: .*ends after 100 frames, but number 100 is needed"):
        list(decode.read_video(FileSource(complete), [0, 100]))
    with pytest.raises(TrainingDataError, match="a broken video: it is cut off: its header states .* bytes"):
        decode.probe_video(FileSource(cut(complete, 0.6)))
    with pytest.raises(TrainingDataError, match="a broken video: "):
        list(decode.read_video(FileSource(complete), [0, 99]))
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(TrainingDataError, match="a broken video: "):
        decode.probe_video(FileSource(tmp_path / "b.mp4"))


def test_video_that_is_damaged_in_the_middle(tmp_path):
    path = video(tmp_path / "a.mp4", frames=20, noise=True)
    assert len(list(decode.read_video(FileSource(path), range(20)))) == 20
    data = bytearray(path.read_bytes())
    start = len(data) // 3
    data[start : start + 2000] = torch.randint(0, 256, (2000,)).byte().numpy().tobytes()
    path.write_bytes(data)
    assert decode.probe_video(FileSource(path)).frames == 20
    with pytest.raises(TrainingDataError, match="a broken video: "):
        list(decode.read_video(FileSource(path), range(20)))


def test_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def none(name, *args, **kwargs):
        if name.split(".")[0] in ("av", "PIL"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(decode.MissingDecoderError, match="pip install av.*'av'"):
        decode.probe_video(None)
    with pytest.raises(decode.MissingDecoderError, match="pip install pillow"):
        decode.read_image(None)
