"""The kinds of latents that a model learns, and what families do with latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..loss import Level
from ..transfers import to_device


class Loss(Protocol):
    """The loss of each sample, float32 [batch]."""

    def __call__(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        """The first three arguments have the latents' shape. `mask` weighs the latents of images and videos, float32
        [batch, 1, 1, height, width]; None weighs all alike."""
        ...


class Latents(NamedTuple):
    """A kind of latents that a transformer learns."""

    normalise: Callable[[Tensor], Tensor]
    """Scales the VAE's latents to the transformer's range."""
    prediction: Callable[[Tensor, Sequence[int]], Tensor]
    """Converts the transformer's output to latents, whose shape is the second argument."""
    loss: Loss
    weight: float = 1.0
    """Weight of the loss."""

    def sample(self, batch: Mapping[str, Tensor], kind: str, noise: Tensor) -> Tensor:
        """A normalised sample of the distribution of a batch, float32, drawn with the normal `noise`. If the batch has
        no log-variance, the sample is the mean."""
        mean, logvar = batch[f"latents_{kind}mean"].float(), batch.get(f"latents_{kind}logvar")
        if logvar is None:
            return self.normalise(mean)
        logvar = logvar.float()
        return self.normalise(mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise)


class Waveform(NamedTuple):
    """Generated sound."""

    samples: Tensor
    """[channels, samples] in [-1, 1]."""
    rate: int
    """Samples per second."""


def standardised(latents: Tensor, config: Any) -> Tensor:
    """Latents [batch, channels, frames, height, width], standardised by each channel's mean and deviation in the VAE's
    configuration."""
    statistics = torch.tensor([config.latents_mean, config.latents_std])
    mean, std = to_device(statistics, latents).view(2, 1, -1, 1, 1, 1)
    return (latents - mean) / std


def patches(shape: Sequence[int], size: int, frames: int = 1) -> int:
    """Number of patches of `frames` x `size` x `size` in latents of shape [..., frames, height, width]."""
    return (shape[-3] // frames) * (shape[-2] // size) * (shape[-1] // size)


def shifted_and_scaled(latents: Tensor, config: Any) -> Tensor:
    """Latents with the shift and scale of an `AutoencoderKL`'s configuration."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
