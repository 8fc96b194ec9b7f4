"""Drawn videos keep their colours and the rate at which they were trained."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_attn.training.data.decode import probe_video, read_video
from diffusers_attn.training.data.frames import FramePicking
from diffusers_attn.training.data.source import FileSource
from diffusers_attn.training.loop.validation import _save
from diffusers_attn.training.loop.video import first_frame


@pytest.mark.parametrize("size", [(48, 64), (45, 63)])
@pytest.mark.parametrize("fps", [8.0, 30000 / 1001, 6.5])
def test_colours_and_rate(tmp_path, size, fps):
    """More colours than a palette has, and steps between them that are as small as those of a weak adapter."""
    height, width = size
    x, y, t = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height), np.linspace(0, 1, 7), indexing="xy")
    frames = np.stack([x, y, 0.5 + 0.5 * np.sin(3 * t)], -1).transpose(2, 0, 1, 3)
    path = _save(frames, tmp_path / "a", fps, lossless=False)
    media = probe_video(FileSource(path))
    assert path.name == "a.mp4" and media[:3] == (width, height, 7)
    assert media.fps == pytest.approx(fps, rel=1e-3)
    back = np.stack([each.permute(1, 2, 0).numpy() for each in read_video(FileSource(path), range(7))])
    assert np.abs(back / 255.0 - frames).mean() < 0.01
    weak = [
        _save((frames * 0.9 + share).astype(np.float32), tmp_path / f"{share}", fps, lossless=False)
        for share in (0.0, 0.01)
    ]
    without, with_ = (np.stack([each.numpy() for each in read_video(FileSource(each), range(7))]) for each in weak)
    assert (with_.astype(float) - without).mean() == pytest.approx(2.55, abs=0.4)
    assert np.array_equal(first_frame(path), back[0])


def test_the_rate_is_that_of_what_was_picked():
    assert FramePicking(fps=12.0).rate(100, 30.0, 49) == 12.0
    assert FramePicking().rate(100, 30.0, 49) == 30.0
    assert FramePicking(pick="spread").rate(97, 30.0, 49) == 15.0
    assert FramePicking().rate(97, None, 49) is None
