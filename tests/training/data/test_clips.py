"""Several clips of a video: their frames, by number and by time."""

import pytest

from diffusers_attn.training.data import Buckets, FramePicking, LatentCache, TrainingDataError, read_folder
from diffusers_attn.training.data.clips import with_clips
from diffusers_attn.training.data.store import read_tensors

from .media import album, encode, video, video_at


def frames_of(folder, clips, wanted=5, fps=None, **others):
    buckets = Buckets.of(32 * 32, frames=(1, wanted), picking=FramePicking(fps, **others))
    found = with_clips(read_folder(folder), buckets, clips)
    return {each.name: buckets.numbers(each, buckets.bucket(each)) for each in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    video(folder / "a.mp4", frames=12, fps=8)
    (folder / "a.txt").write_text("blue grows")
    return album(folder, 1)


def test_each_rule(folder):
    picture = {"00.png": [0]}
    assert frames_of(folder, "head") == {**picture, "a.mp4": [0, 1, 2, 3, 4]}
    assert frames_of(folder, "middle") == {**picture, "a.mp4": [3, 4, 5, 6, 7]}
    assert frames_of(folder, "uniform:1") == {**picture, "a.mp4": [3, 4, 5, 6, 7]}
    assert frames_of(folder, "uniform:3") == {
        **picture,
        "a.mp4, clip 1": [0, 1, 2, 3, 4],
        "a.mp4, clip 2": [3, 4, 5, 6, 7],
        "a.mp4, clip 3": [7, 8, 9, 10, 11],
    }
    assert frames_of(folder, "all") == {
        **picture,
        "a.mp4, clip 1": [0, 1, 2, 3, 4],
        "a.mp4, clip 2": [5, 6, 7, 8, 9],
    }


def test_at_another_rate(folder):
    """At 4 frames per second the video has six frames: each second one."""
    assert frames_of(folder, "all", wanted=3, fps=4)["a.mp4, clip 2"] == [6, 8, 10]
    assert frames_of(folder, "all", wanted=9, fps=16)["a.mp4, clip 2"] == [4, 5, 5, 6, 6, 7, 7, 8, 8]


def test_by_time(tmp_path):
    """One second with 10 frames, one with 5, and one with 10."""
    times = [*range(0, 1000, 100), *range(1000, 2000, 200), *range(2000, 3001, 100)]
    video_at(tmp_path / "a.mp4", times)
    (tmp_path / "a.txt").write_text("slower and faster")
    found = frames_of(tmp_path, "all", wanted=5, fps=5)
    assert [[times[each] for each in numbers] for numbers in found.values()] == [
        [0, 200, 400, 600, 800],
        [1000, 1200, 1400, 1600, 1800],
        [2000, 2200, 2400, 2600, 2800],
    ]


def test_clips_that_are_equal_are_one(folder):
    assert len(frames_of(folder, "uniform:100")) == 1 + 8  # twelve frames have eight different clips of five
    assert list(frames_of(folder, "all", wanted=12)) == ["00.png", "a.mp4"]


def test_latents_of_clips(folder, tmp_path):
    buckets = Buckets.of(32 * 32, frames=(1, 5))
    cached = LatentCache(tmp_path, {}, buckets).fill(with_clips(read_folder(folder), buckets, "all"), encode)
    assert [each.example.name for each in cached] == ["00.png", "a.mp4, clip 1", "a.mp4, clip 2"]
    blue = (read_tensors(cached[2].path)["latents_mean"][2, :, -1, -1] + 1) * 127.5
    assert blue.tolist() == pytest.approx([100, 120, 140, 160, 180], abs=8)


def test_what_is_not_accepted(folder):
    for clips in ("uniform", "uniform:0", "tail", ""):
        with pytest.raises(TrainingDataError, match="accepted are head, middle, uniform:N"):
            frames_of(folder, clips)
    with pytest.raises(TrainingDataError, match="clips='all' with pick='spread'"):
        frames_of(folder, "all", pick="spread")
    # A video that is too short stays, so that the cache names it with all other problems.
    buckets = Buckets.of(32 * 32, frames=(1, 49))
    assert [each.name for each in with_clips(read_folder(folder), buckets, "all")] == ["00.png", "a.mp4"]
