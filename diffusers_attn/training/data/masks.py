"""Masks of the loss: which parts of an image or video are learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from . import decode
from .errors import Problem, TrainingDataError
from .source import FileSource, Source
from .walk import files_of

MASKS = ("none", "files", "alpha")
"""Where masks come from: nowhere, files beside those of the examples, or the transparency of images."""
_ENDING = "_mask"


class Mask(NamedTuple):
    """The mask of an example: white, or opaque, where the loss counts."""

    source: Source
    channel: Literal["luminance", "alpha"]


def check_masks(masks: str) -> None:
    """Raises a TrainingDataError unless `masks` is one of `MASKS`."""
    if masks not in MASKS:
        raise TrainingDataError(f"loss_mask={masks!r}: accepted are {', '.join(map(repr, MASKS))}.")


def is_mask(path: str | PurePosixPath) -> bool:
    """Whether a file has the name of a mask."""
    path = PurePosixPath(path)
    return path.stem.endswith(_ENDING) and path.suffix.lower() in decode.IMAGE_SUFFIXES


def masks_in(
    root: Path, captioned: Iterable[str], excluded: Iterable[Path] = ()
) -> tuple[dict[str, Mask], list[Problem]]:
    """The masks in a folder: that of `people/a.png` or `people/a.mp4` is `people/a_mask.png` (or another image).

    Args:
        root: the folder.
        captioned: images and videos by path relative to `root`.
        excluded: folders that are not read.

    Returns:
        The mask of each image or video that has one, and the masks that belong to none as problems.
    """
    of_stem = {_stem(name): name for name in captioned if not is_mask(name)}
    masks: dict[str, Mask] = {}
    problems = []
    for file in files_of(root, excluded)[0]:
        name = file.relative_to(root).as_posix()
        if not is_mask(name):
            continue
        owner = of_stem.get(_stem(name).removesuffix(_ENDING))
        if owner is None:
            problems.append(Problem(name, "a mask for no file: no usable image or video has this name without _mask"))
        elif owner in masks:
            problems.append(Problem(name, f"a second mask for {owner}"))
        else:
            masks[owner] = Mask(FileSource(file), "luminance")
    return masks, problems


def check_size(mask: Mask, width: int, height: int) -> None:
    """Raises a TrainingDataError unless a mask has the size of its image or video, or cannot be read."""
    media = decode.probe_image(mask.source)
    if (media.width, media.height) != (width, height):
        raise TrainingDataError(
            f"its mask has {media.width}x{media.height} pixels, but it has {width}x{height}; equal sizes are needed"
        )


def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """The weight of each latent: the mean of the mask's pixels that it covers.

    Args:
        mask: [1, 1, height, width] in [0, 1], in pixels.
        latents: [channels, frames, height, width].

    Returns:
        float32 [1, 1, height, width] of the latents, for all channels and frames.
    """
    height, width = latents.shape[-2:]
    return F.adaptive_avg_pool2d(mask.float(), (height, width))


def with_ones(rows: Sequence[Mapping[str, Tensor]], name: str) -> list[dict[str, Tensor]]:
    """The tensors of a batch's examples. If one of them has the mask `name`, those without it get one of ones."""
    like = next((row[name] for row in rows if name in row), None)
    return [dict(row) if like is None or name in row else {**row, name: like.new_ones(like.shape)} for row in rows]


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
