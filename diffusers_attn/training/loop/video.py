"""Generated videos as MP4 files, and without loss as Matroska files, with the frame rate of the training data, and with
sound if the model generates it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from ..families.latents import Waveform


def write_video(frames: Any, path: Path, fps: float, sound: Waveform | None = None) -> None:
    """Writes an MP4 that browsers, model cards and trackers play.

    Args:
        frames: uint8 [frames, height, width, 3].
        path: a file name that ends in ".mp4".
        fps: frames per second.
        sound: its sound, from the first frame on.
    """
    import av

    height, width = frames.shape[1:3]
    codec, options = ("libx264", {"crf": "10"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "2"})
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        # All players support 4:2:0 chroma subsampling, which needs even sizes.
        stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        stream.height, stream.width = height, width
        track = _track(container, "aac", sound)
        for each in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())
        _write_sound(container, track, sound)


def write_lossless(frames: Any, path: Path, fps: float, sound: Waveform | None = None) -> None:
    """Writes a video whose decoded frames are the given ones, with FFV1, and its sound with FLAC. Few browsers play it.

    Args:
        frames: uint8 [frames, height, width, 3].
        path: a file name that ends in ".mkv".
        fps: frames per second.
        sound: its sound, from the first frame on.
    """
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "bgr0"
        stream.height, stream.width = frames.shape[1:3]
        track = _track(container, "flac", sound)
        for each in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())
        _write_sound(container, track, sound)


def _track(container: Any, codec: str, sound: Waveform | None) -> Any:
    """A track for sound in a new file, which must be added before frames are written; None without sound."""
    return None if sound is None else container.add_stream(codec, rate=sound.rate, layout=_layout(sound))


def _layout(sound: Waveform) -> str:
    return "mono" if len(sound.samples) == 1 else "stereo"


def _write_sound(container: Any, track: Any, sound: Waveform | None) -> None:
    import av
    import numpy as np

    if sound is None:
        return
    samples = np.ascontiguousarray(sound.samples.float().cpu().clamp(-1, 1).numpy())
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    container.mux(track.encode(frame))
    container.mux(track.encode())


def first_frame(path: Path) -> Any:
    """The first frame of a video, uint8 [height, width, 3]."""
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")
