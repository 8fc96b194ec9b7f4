"""Resizes frames so that they cover the size of their bucket, and crops the rest; or puts borders around them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .buckets import Bucket, cover_scale
from .errors import TrainingDataError

CROPS = ("centre", "random")


def resize_crop(frames: Iterable[Tensor], bucket: Bucket, *, crop: str = "centre", seed: int = 0) -> Tensor:
    """Resizes and crops frames to the size of a bucket.

    Args:
        frames: frames, uint8 [3, height, width] each, as many as the bucket has.
        bucket: the size.
        crop: "centre" keeps the middle; "random" keeps a random part, the same in all frames.
        seed: seed of a random crop.

    Returns:
        float32 [frames, 3, height, width] in [-1, 1].

    Raises:
        TrainingDataError: an unknown `crop`, or the number of frames is not the bucket's.
    """
    if crop not in CROPS:
        raise TrainingDataError(f"crop={crop!r}: accepted are {', '.join(map(repr, CROPS))}.")
    resized = []
    for frame in frames:
        height, width = frame.shape[-2:]
        scale = cover_scale(height, width, bucket.height, bucket.width)
        size = (max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale)))
        pixels = frame[None].float()
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        over = (size[0] - bucket.height, size[1] - bucket.width)
        if crop == "centre":
            top, left = over[0] // 2, over[1] // 2
        else:
            share = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            top, left = (int(each * (room + 1)) for each, room in zip(share.tolist(), over))
        pixels = pixels[0, :, top : top + bucket.height, left : left + bucket.width]
        resized.append((pixels / 127.5 - 1).clamp(-1, 1))
    if len(resized) != bucket.frames:
        raise TrainingDataError(f"it has {len(resized)} frames, but {bucket.frames} are needed")
    return torch.stack(resized)


def with_borders(picture: Tensor, height: int, width: int) -> Tensor:
    """Resizes a picture until its height or width is the wanted one, and puts it on white.

    Args:
        picture: uint8 [3, height, width].

    Returns:
        float32 [3, height, width] in [-1, 1].
    """
    scale = min(height / picture.shape[1], width / picture.shape[2])
    size = (int(picture.shape[1] * scale), int(picture.shape[2] * scale))
    # Without antialiasing, as diffusers' pipeline of Wan VACE resizes.
    resized = F.interpolate(picture[None].float() / 127.5 - 1, size, mode="bilinear", align_corners=False)[0]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    found = torch.ones(3, height, width)
    found[:, top : top + size[0], left : left + size[1]] = resized
    return found
