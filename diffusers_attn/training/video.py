"""Drawn videos as files: at the rate at which they were trained, and with all of their colours."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any


def write_video(frames: Any, path: Path, fps: float) -> None:
    """Writes an MP4 that browsers, cards and trackers show.

    Args:
        frames: uint8 [frames, height, width, 3].
        path: ends in ".mp4".
        fps: frames per second.
    """
    import av

    height, width = frames.shape[1:3]
    codec, options = ("libx264", {"crf": "10"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "2"})
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        # Half as many values of colour in each direction, which all players show, go with even sizes only.
        stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        stream.height, stream.width = height, width
        for each in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())


def first_frame(path: Path) -> Any:
    """Of a video: uint8 [height, width, 3]."""
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")
