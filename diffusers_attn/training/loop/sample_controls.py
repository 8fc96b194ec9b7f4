"""The controls and masks of samples, as the frames that the pipeline gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data import decode
from ..data.buckets import Bucket
from ..data.conditions import given_file, probe
from ..data.errors import TrainingDataError
from ..data.frames import FramePicking
from ..data.resize_crop import resize_crop
from ..errors import TrainingError


def control_frames(path: str, bucket: Bucket, fps: float) -> list[Any]:
    """The frames of a control, or of its mask, as PIL images.

    Args:
        path: a picture, which holds for all frames, or a video, of which the beginning is taken.
        bucket: number of frames, height and width.
        fps: frames per second.

    Raises:
        TrainingError: it cannot be read, or is too short.
    """
    from PIL import Image

    source, kind = given = given_file(Path(path))
    try:
        if kind == "image":
            pixels = resize_crop([decode.read_image(source)], bucket._replace(frames=1))
        else:
            media = probe(given)
            numbers = FramePicking(fps).numbers(media.frames, media.fps, bucket.frames, media.times, place=0.0)
            pixels = resize_crop(decode.read_video(source, numbers), bucket)
    except (OSError, TrainingDataError) as error:
        raise TrainingError(f"control {path} cannot be used for a sample of {bucket.frames} frames: {error}") from error
    frames = [Image.fromarray(each.numpy()) for each in _bytes(pixels)]
    return frames * bucket.frames if kind == "image" else frames


def _bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [frames, 3, height, width] in [-1, 1] as uint8 [frames, height, width, 3]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).contiguous()
