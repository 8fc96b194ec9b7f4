"""The sound of videos: of the frames that are picked, at any rate, and refused by name where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_attn.training.data import Buckets, FramePicking, LatentCache, TrainingDataError, read_folder
from diffusers_attn.training.data.sound import Span, read_sound, with_sound
from diffusers_attn.training.data.source import FileSource
from diffusers_attn.training.data.store import read_tensors

from .media import picture, sounding_video, tone, video

RATE = 16_000


def heard(span: Span) -> np.ndarray:
    """Times of the samples of a part of a video."""
    return span.start + np.arange(round(span.length * RATE)) / RATE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {}),
        ("a.mov", {"codec": "pcm_s16le", "rate": 44_100, "layout": "mono"}),
        ("a.mp4", {"codec": "aac", "rate": 16_000}),
    ],
)
def test_a_part_is_what_is_heard_at_its_time(tmp_path, name, options):
    """Through resampling. Each channel by itself; both are those of a mono track."""
    path = sounding_video(tmp_path / name, frames=48, **options)
    span = Span(0.5, 1.0)
    left, right = read_sound(FileSource(path), span, RATE)
    expected = torch.from_numpy(tone(heard(span))).float()
    assert torch.allclose(left, expected, atol=2e-3)
    assert torch.allclose(right, expected if options.get("layout") == "mono" else expected / 2, atol=2e-3)


def test_it_is_silent_before_it_begins_and_after_it_ends(tmp_path):
    path = sounding_video(tmp_path / "a.mkv", frames=48, begins=0.5, seconds=1.0)
    span = Span(0.0, 2.0)
    sound, _ = read_sound(FileSource(path), span, RATE)
    times = heard(span)
    inside = (times > 0.51) & (times < 1.49)
    assert np.allclose(sound[inside], tone(times[inside] - 0.5), atol=2e-3)
    assert not sound[(times < 0.49) | (times > 1.51)].any()
    with pytest.raises(TrainingDataError, match=r"broken track of sound: it has no samples from 1\.60 s to 1\.90 s"):
        read_sound(FileSource(path), Span(1.6, 0.3), RATE)


def test_videos_without_sound_are_named(tmp_path):
    sounding_video(tmp_path / "a.mkv", frames=9)
    video(tmp_path / "b.mp4")
    picture(tmp_path / "c.png")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    examples = read_folder(tmp_path)
    with pytest.raises(
        TrainingDataError, match="2 of the files.*\n.*b.mp4: no sound.*--audio_weight 0.*\n.*c.png: no so"
    ):
        with_sound(examples)
    assert [each.name for each in with_sound(examples, on_bad_data="skip")] == ["a.mkv"]
    (tmp_path / "b.mp4").write_text("damaged")
    with pytest.raises(TrainingDataError, match=r"2 of the files.*\n.*b.mp4: a broken video.*\n.*c.png: no sound"):
        with_sound(examples)


def test_the_cache_reads_that_of_the_frames_that_are_picked(tmp_path):
    """Of nine frames from the middle of 24, and of five at half of the rate."""
    sounding_video(tmp_path / "data" / "a.mov", frames=24, codec="pcm_s16le")
    (tmp_path / "data" / "a.txt").write_text("a")
    given = {}

    def encode(pixels, sound):
        given["sound"] = sound
        return {"latents_mean": pixels.mean((1, 3, 4))}

    def filled(frames, fps):
        buckets = Buckets.of(48 * 64, multiple=8, aspects=[4 / 3], frames=[frames], picking=FramePicking(fps))
        [cached] = LatentCache(tmp_path / "cache", {}, buckets, sound_rate=RATE).fill(
            read_folder(tmp_path / "data"), encode
        )
        return cached.path

    first = filled(9, 24.0)
    assert given["sound"].shape == (1, 2, 6000)
    expected = tone((round(7 / 24 * RATE) + np.arange(6000)) / RATE)
    assert np.allclose(given["sound"][0, 0], expected, atol=2e-3)
    second = filled(5, 12.0)
    assert given["sound"].shape == (1, 2, 6667) and second != first
    assert read_tensors(first)["latents_mean"].shape == (9,)
