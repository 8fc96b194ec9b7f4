"""What an encoder gets of an example: its frames, its conditions and its mask, in the size of its bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import decode
from .buckets import Bucket
from .conditions import CONDITIONS, Given
from .errors import TrainingDataError
from .examples import Example
from .resize_crop import resize_crop, with_borders


class References(NamedTuple):
    """How reference images are resized."""

    size: Callable[[int, int], tuple[int, int]] = lambda height, width: (height, width)
    """Their height and width, of an example with a height and width."""
    borders: bool = False
    """Whether they get white borders and are not cropped."""


class Pixels(NamedTuple):
    """An example for the encoder. Pixels are float32 in [-1, 1]."""

    frames: Tensor
    """[frames, 3, height, width]."""
    given: dict[str, Tensor]
    """Conditions by their kind: reference images [number, 3, height, width], others [3, frames, height, width]; and
    "sound", [2, samples], if it is read."""
    mask: Tensor | None
    """The mask of its loss, [1, 1, height, width] in [0, 1]."""


def read_pixels(
    example: Example, bucket: Bucket, numbers: Sequence[int], references: References, **cropping: Any
) -> Pixels:
    """Decodes an example, resizes and crops it.

    Args:
        example: the example.
        bucket: its size.
        numbers: numbers of its frames.
        references: how reference images are resized.
        cropping: settings of `resize_crop`.

    Raises:
        TrainingDataError: something cannot be decoded, or the mask leaves out everything.
    """
    frames = resize_crop(decode.read(example, numbers), bucket, **cropping)
    given = {
        name: _following(several, bucket, numbers, cropping)
        if CONDITIONS[name].follows
        else read_references(several, bucket, references, **cropping)
        for name, several in example.conditions.items()
    }
    return Pixels(frames, given, _mask(example, bucket, cropping))


def read_references(given: Sequence[Given], bucket: Bucket, references: References, **cropping: Any) -> Tensor:
    """Reference images [number, 3, height, width]; see `read_pixels`."""
    height, width = references.size(bucket.height, bucket.width)
    pictures = [decode.read_image(each.source) for each in given]
    if references.borders:
        return torch.stack([with_borders(each, height, width) for each in pictures])
    return torch.cat([resize_crop([each], Bucket(1, height, width), **cropping) for each in pictures])


def _following(given: Sequence[Given], bucket: Bucket, numbers: Sequence[int], cropping: dict[str, Any]) -> Tensor:
    """A condition that follows its example, [3, frames, height, width]."""
    [(source, kind)] = given
    if kind == "video":
        return resize_crop(decode.read_video(source, numbers), bucket, **cropping).transpose(0, 1)
    picture = resize_crop([decode.read_image(source)], bucket._replace(frames=1), **cropping)
    return picture.expand(bucket.frames, -1, -1, -1).transpose(0, 1)


def _mask(example: Example, bucket: Bucket, cropping: dict[str, Any]) -> Tensor | None:
    """The mask of an example, resized and cropped as its frames."""
    if example.mask is None:
        return None
    mask = (resize_crop([decode.read_mask(*example.mask)], bucket._replace(frames=1), **cropping) + 1) / 2
    if not bool(mask.any()):
        raise TrainingDataError("its mask leaves out everything in its bucket")
    return mask
