"""Clips: several parts of a video as examples of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .buckets import Bucket, Buckets
from .errors import TrainingDataError
from .examples import Example

RULES = {"head": "head", "middle": "middle", "uniform:N": "uniform:[1-9][0-9]*", "all": "all"}
"""The accepted rules, each with the regular expression that matches it."""


def check_clips(clips: str) -> None:
    """Raises a TrainingDataError unless `clips` is a rule of `with_clips`."""
    if not any(re.fullmatch(pattern, clips) for pattern in RULES.values()):
        raise TrainingDataError(f"clips={clips!r}: accepted are {', '.join(RULES)}.")


def with_clips(examples: Sequence[Example], buckets: Buckets, clips: str) -> list[Example]:
    """Replaces each video by its clips, which have the number of frames of the video's bucket.

    Args:
        examples: images, which stay as they are, and videos.
        buckets: sizes to which examples are resized, with the frame rate of the clips.
        clips: "head" takes the beginning of each video, "middle" its middle; "uniform:N" takes N clips, the first from
            the beginning, the last from the end, and the others evenly spaced, which overlap in a short video; "all"
            takes one clip after the other from the beginning, and leaves out what is too short for one more.

    Returns:
        The examples. A video that fits no bucket is one of them; `LatentCache.fill` reports it.

    Raises:
        TrainingDataError: an unknown rule, or one besides "middle" for frames that are spread over entire videos.
    """
    check_clips(clips)
    if clips == "middle":
        return list(examples)
    if buckets.picking.pick == "spread":
        raise TrainingDataError(
            f"clips={clips!r} with pick='spread', which spreads the frames of one clip over the entire video. Leave "
            "one of them out."
        )
    return [clip for each in examples for clip in _clips(each, buckets, clips)]


def _clips(example: Example, buckets: Buckets, clips: str) -> list[Example]:
    if example.kind == "image":
        return [example]
    try:
        bucket = buckets.bucket(example)
    except TrainingDataError:
        return [example]
    # Clips of the same frames would be the same example twice.
    found = {
        tuple(buckets.numbers(each, bucket)): each
        for each in (dataclasses.replace(example, place=place) for place in _places(example, buckets, bucket, clips))
    }
    if len(found) == 1:
        return list(found.values())
    return [
        dataclasses.replace(each, name=f"{example.name}, clip {number}")
        for number, each in enumerate(found.values(), 1)
    ]


def _places(example: Example, buckets: Buckets, bucket: Bucket, clips: str) -> list[float]:
    """Where each clip begins: 0 is the beginning of the video, 1 is so late that the clip ends with the video."""
    if clips == "head":
        return [0.0]
    if clips.startswith("uniform:"):
        number = int(clips.partition(":")[2])
        return [i / (number - 1) for i in range(number)] if number > 1 else [0.5]
    usable = buckets.picking.usable(example.frames, example.fps, example.times)
    room = buckets.picking.room(example.frames, example.fps, bucket.frames, example.times)
    return [min(i * bucket.frames / room, 1.0) if room else 0.0 for i in range(usable // bucket.frames)]
