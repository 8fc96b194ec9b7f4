"""Distances between images: PSNR, SSIM and LPIPS."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import numpy as np
import torch

SMALLEST = 11
"""Pixels of SSIM's window, and so the smallest height and width of an image."""
_SIGMA, _K1, _K2 = 1.5, 0.01, 0.03


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of arrays in [0, 1]; infinite if they are equal."""
    noise = float(np.square(one - other).mean())
    return math.inf if noise == 0.0 else -10 * math.log10(noise)


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two images `[height, width, channels]` in [0, 1]; 1 if equal.

    The window is a Gaussian with a standard deviation of 1.5 pixels, and is moved where it fits into the image. Equals
    `skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    """
    mean_one, mean_other = _blurred(one), _blurred(other)
    variance_one = _blurred(one * one) - mean_one * mean_one
    variance_other = _blurred(other * other) - mean_other * mean_other
    covariance = _blurred(one * other) - mean_one * mean_other
    c1, c2 = _K1**2, _K2**2
    similar = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    similar /= (mean_one**2 + mean_other**2 + c1) * (variance_one + variance_other + c2)
    return float(similar.mean())


def _blurred(image: np.ndarray) -> np.ndarray:
    """The image under the Gaussian window, where the window fits into it."""
    offsets = np.arange(SMALLEST) - SMALLEST // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        size = image.shape[axis] - SMALLEST + 1
        image = sum(weight * image.take(range(start, start + size), axis=axis) for start, weight in enumerate(weights))
    return image


def lpips_is_installed() -> bool:
    return importlib.util.find_spec("lpips") is not None


def lpips(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """LPIPS with AlexNet (Zhang et al. 2018) of pairs of images `[height, width, 3]` in [0, 1], by the package `lpips`,
    which downloads the network's weights."""
    import lpips as package

    network = package.LPIPS(net="alex", verbose=False).eval()

    def as_tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image).float().permute(2, 0, 1)[None] * 2 - 1

    with torch.no_grad():
        return [network(as_tensor(one), as_tensor(other)).item() for one, other in pairs]
