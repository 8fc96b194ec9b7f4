"""`compare_outputs`, and the comparison that it returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import write_atomically
from ..errors import AttentionProviderError
from .frames import PICTURES, frames_of
from .metrics import SMALLEST, lpips, lpips_is_installed, psnr, ssim
from .sheet import sheet

_ROWS = 8
"""More frames than these are a video, of which a picture shows the one that differs most."""


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """How far two images or videos are apart, see `compare_outputs`. Prints as one line."""

    frames: int
    """Number of frames, or of images."""
    psnr: float
    """Peak signal-to-noise ratio in dB over all frames; infinite if both are equal."""
    ssim: float
    """Structural similarity, the mean of all frames; 1 if both are equal."""
    lpips: float | None
    """LPIPS with AlexNet, the mean of all frames, 0 if both are equal; None if it was not computed."""
    relative_error: float
    """Norm of the difference over the norm of the first, over all frames."""
    max_difference: float
    """The largest difference of a channel of a pixel, from 0 to 1."""
    mean_difference: float
    """The mean of these differences."""
    worst_frame: int
    """Number of the frame with the lowest PSNR, from 0 on."""
    worst_psnr: float
    """PSNR of that frame, in dB."""

    def __str__(self) -> str:
        if self.max_difference == 0.0:
            return "equal" if self.frames == 1 else f"equal in all {self.frames} frames"
        perceived = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        worst = f"; worst in frame {self.worst_frame}: {self.worst_psnr:.1f} dB" if self.frames > 1 else ""
        return (
            f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}{perceived}, relative error {self.relative_error:.1e}, at "
            f"most {self.max_difference * 255:.3g} of 255 levels{worst}"
        )


def compare_outputs(
    a: Any,
    b: Any,
    *,
    save: str | Path | None = None,
    names: tuple[str, str] = ("a", "b"),
    title: str = "",
    use_lpips: bool | None = None,
) -> OutputComparison:
    """Compares two images or videos, such as those of an exact and of a lossy provider.

    Args:
        a: the reference: a PIL image, an array, a tensor, the path of a picture or video, of a folder with frames, or
            a list of these. Arrays and tensors are `[height, width, 3]` or `[3, height, width]`, with or without frames
            before, or `[3, frames, height, width]`; uint8, or floats in [0, 1]. Further dimensions count as frames.
        b: the same in any of these forms, with as many frames of the same size.
        save: a file for a picture of both, side by side with their difference enlarged, such as "compare.png". Of more
            than 8 frames it shows the one that differs most.
        names: names of both in the picture.
        title: text before the numbers in the picture's title, such as the prompt.
        use_lpips: whether LPIPS is computed, by the package `lpips`, which downloads a network once. None: if the
            package is installed.

    Returns:
        PSNR, SSIM, LPIPS, relative error and differences. It prints as one line.

    Raises:
        AttentionProviderError: they have other forms or different sizes, or a package is missing.
    """
    one, other = frames_of(a, "a"), frames_of(b, "b")
    if one.shape != other.shape:
        raise AttentionProviderError(
            f"a has {_size(one)} and b {_size(other)}: both must be the same in number and size of frames."
        )
    if min(one.shape[1:3]) < SMALLEST:
        raise AttentionProviderError(f"the images are {_size(one)}; SSIM needs {SMALLEST} pixels in height and width.")
    if save is not None and Path(save).suffix.lower() not in PICTURES:
        raise AttentionProviderError(f"save={str(save)!r}: the name of a picture is accepted ({', '.join(PICTURES)}).")
    if use_lpips and not lpips_is_installed():
        raise AttentionProviderError("use_lpips=True needs a package: `pip install lpips`.")
    difference = np.abs(one - other)
    by_frame = [psnr(*pair) for pair in zip(one, other)]
    perceived = None
    if use_lpips or (use_lpips is None and lpips_is_installed()):
        perceived = float(np.mean(lpips(zip(one, other))))
    norm = float(np.linalg.norm(one))
    found = OutputComparison(
        frames=len(one),
        psnr=psnr(one, other),
        ssim=float(np.mean([ssim(*pair) for pair in zip(one, other)])),
        lpips=perceived,
        relative_error=float(np.linalg.norm(difference)) / norm if norm else float(difference.any()),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        worst_frame=int(np.argmin(by_frame)),
        worst_psnr=min(by_frame),
    )
    if save is not None:
        shown = range(len(one)) if len(one) <= _ROWS else [found.worst_frame]
        rows = [(f"frame {index}" if len(one) > 1 else "", one[index], other[index]) for index in shown]
        write_atomically(Path(save), sheet(rows, names, f"{title}: {found}" if title else str(found)).save)
    return found


def _size(frames: np.ndarray) -> str:
    number = "1 frame" if len(frames) == 1 else f"{len(frames)} frames"
    return f"{number} of {frames.shape[1]} x {frames.shape[2]} (height x width)"
