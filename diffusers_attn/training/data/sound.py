"""The sound of videos: the part of a track that belongs to the frames of a clip, read with PyAV."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import decode
from .buckets import Bucket
from .errors import Problem, TrainingDataError, report_problems
from .examples import Example
from .source import Source

_THREADS = 8
_JITTER = 0.02
"""Seconds by which the time of a packet may differ from the end of the one before without a gap between them."""


class Span(NamedTuple):
    """A part of a video, in seconds."""

    start: float
    """From the first frame."""
    length: float


def with_sound(examples: Sequence[Example], *, on_bad_data: str = "refuse", main_process: bool = True) -> list[Example]:
    """The examples that have sound. The others are problems.

    Args:
        examples: videos.
        on_bad_data: "refuse" raises an error that names all without sound; "skip" leaves these out.
        main_process: whether this process logs the warning about those left out.

    Raises:
        TrainingDataError: examples have no sound and `on_bad_data` is "refuse", or none has any.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = list(pool.map(_reason_against, examples))
    found = [each for each, reason in zip(examples, reasons) if reason is None]
    problems = [Problem(each.name, reason) for each, reason in zip(examples, reasons) if reason is not None]
    report_problems(problems, len(found), f"{len(examples)} examples", on_bad_data, main_process)
    return found


def _reason_against(example: Example) -> str | None:
    """Why an example cannot be used; None if it can."""
    try:
        if has_sound(example):
            return None
    except TrainingDataError as error:
        return str(error)
    return "no sound, which the model learns beside the video; --audio_weight 0 trains videos alone"


def has_sound(example: Example) -> bool:
    """Whether an example is a video with a track of sound."""
    if example.kind == "image":
        return False
    av = decode.pyav()
    with decode.broken("video"), example.source.open() as file, av.open(file) as container:
        return bool(container.streams.audio)


def span_of(example: Example, bucket: Bucket, numbers: Sequence[int], fps: float) -> Span:
    """The part of a video whose frames `numbers` are shown at `fps` frames per second."""
    first = numbers[0]
    start = example.times[first] if example.times is not None else first / (example.fps or fps)
    return Span(start, bucket.frames / fps)


def read_sound(source: Source, span: Span, rate: int) -> Tensor:
    """Decodes a part of a video's first track of sound. It is silent where the track has no samples.

    Args:
        source: the video.
        span: the part.
        rate: samples per second.

    Returns:
        float32 [2, samples] in [-1, 1], left and right. They are the same for a mono track; further channels are mixed.

    Raises:
        TrainingDataError: the track cannot be read, or has no sample in this part.
        MissingDecoderError: PyAV is not installed.
    """
    av = decode.pyav()
    with decode.broken("track of sound"), source.open() as file:
        return _read(av, file, span, rate)


def _read(av: Any, file: Any, span: Span, rate: int) -> Tensor:
    samples = round(span.length * rate)
    found = torch.zeros(2, samples)
    heard, end = False, None
    with av.open(file) as container:
        if not container.streams.audio:
            raise ValueError("there is none")
        track, [video, *_] = container.streams.audio[0], container.streams.video
        start = span.start + float((video.start_time or 0) * video.time_base)
        # FFmpeg would make two channels of one quieter.
        layout = "mono" if track.channels == 1 else "stereo"
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        for frame in itertools.chain(container.decode(track), [None]):
            for part in resampler.resample(frame):
                values = torch.from_numpy(part.to_ndarray())
                place = round((float(part.pts * part.time_base) - start) * rate)
                if end is not None and abs(place - end) <= _JITTER * rate:
                    place = end
                end = place + values.shape[1]
                first, last = max(place, 0), min(end, samples)
                if first < last:
                    found[:, first:last] = values[:, first - place : last - place]
                    heard = True
            if end is not None and end >= samples:
                break
    if not heard:
        raise ValueError(f"it has no samples from {span.start:.2f} s to {span.start + span.length:.2f} s")
    return found
