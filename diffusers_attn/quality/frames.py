"""Reads images and videos, as arrays, tensors, PIL images or files, into frames of one form."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import AttentionProviderError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
_SLACK = 1e-3
"""Excess over the range [0, 1] that rounding explains; it is cut off."""


def frames_of(output: Any, name: str) -> np.ndarray:
    """The frames of an image, a video, or several of them.

    Args:
        output: an image or video in any form that `compare_outputs` accepts.
        name: name of the argument, for errors.

    Returns:
        `[frames, height, width, 3]`, float64 in [0, 1].

    Raises:
        AttentionProviderError: it has another form, values outside of their range, or frames of different sizes.
    """
    found = list(_frames(output, name))
    sizes = sorted({each.shape[:2] for each in found})
    if len(sizes) != 1:
        given = ", ".join(f"{height} x {width}" for height, width in sizes) or "none"
        raise AttentionProviderError(f"{name} has frames of these heights and widths: {given}. All need one size.")
    return np.stack(found)


def _frames(output: Any, name: str) -> Iterator[np.ndarray]:
    if isinstance(output, (str, Path)):
        yield from _read(Path(output), name)
    elif isinstance(output, Image.Image):
        yield np.asarray(output.convert("RGB"), dtype=np.float64) / 255
    elif isinstance(output, torch.Tensor):
        array = output.detach().cpu()
        yield from _of_array((array.double() if array.is_floating_point() else array).numpy(), name)
    elif isinstance(output, np.ndarray):
        yield from _of_array(output, name)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _frames(each, name)
    else:
        raise AttentionProviderError(
            f"{name} is a {type(output).__name__}; accepted are PIL images, arrays, tensors, paths of files, and lists "
            "of these. Of a pipeline's output give .images or .frames[0]."
        )


def _of_array(array: np.ndarray, name: str) -> Iterator[np.ndarray]:
    given = list(array.shape)
    if array.ndim == 2:
        array = array[..., None]
    channels = next((dim for dim in (-1, -3, -4) if array.ndim >= max(3, -dim) and array.shape[dim] in (1, 3, 4)), None)
    if channels is None:
        raise AttentionProviderError(
            f"{name} has shape {given}; accepted are [height, width, 3], [3, height, width], either with frames before "
            "it, and [3, frames, height, width], with 1, 3 or 4 channels."
        )
    array = np.moveaxis(array, channels, -1)
    array = array.reshape(-1, *array.shape[-3:])
    if array.dtype == np.uint8:
        array = array / 255
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
        if not (-_SLACK <= low and high <= 1 + _SLACK):  # also where a value is not a number
            raise AttentionProviderError(
                f"{name} has values from {low:.3g} to {high:.3g}; floats from 0 to 1, and uint8, are accepted. Values "
                "from -1 to 1, as a VAE gives them, become that by x / 2 + 0.5."
            )
        array = array.astype(np.float64).clip(0, 1)
    else:
        raise AttentionProviderError(f"{name} has dtype {array.dtype}; uint8 and floats are accepted.")
    for frame in array:
        yield frame[..., :3] if frame.shape[-1] >= 3 else frame.repeat(3, axis=-1)


def _read(path: Path, name: str) -> Iterator[np.ndarray]:
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
        if not files:
            raise AttentionProviderError(f"{name} is the folder {path}, which has no pictures ({', '.join(PICTURES)}).")
        for each in files:
            yield from _read(each, name)
    elif not path.is_file():
        raise AttentionProviderError(f"{name} is {path}, and there is no such file or folder.")
    elif path.suffix.lower() in PICTURES:
        with Image.open(path) as image:
            yield from _frames(image, name)
    elif path.suffix.lower() in VIDEOS:
        if importlib.util.find_spec("imageio") is None or importlib.util.find_spec("imageio_ffmpeg") is None:
            raise AttentionProviderError(f"reading {path} needs a package: `pip install imageio imageio-ffmpeg`.")
        import imageio.v3

        for frame in imageio.v3.imiter(path):
            yield from _of_array(np.asarray(frame), name)
    else:
        raise AttentionProviderError(
            f"{name} is {path}; accepted are {', '.join(PICTURES + VIDEOS)}, and a folder with the frames of a video."
        )
