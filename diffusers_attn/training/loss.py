"""Training objectives: noise levels, noisy samples and losses, for each sample by itself and in float32.

The loss of a sample is the mean of its squared errors; with a mask, their mean weighted by the mask.

A noise level is given as a number `u` in [0, 1]; 1 is pure noise.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import TrainingError
from .settings.choices import SAMPLINGS
from .transfers import to_device

NUM_TRAIN_TIMESTEPS = 1000
"""Timestep of pure noise for the models of rectified flow."""


MOST_DRAWS = 10_000
"""Number of draws after which a range of noise levels counts as one that is never drawn."""


class Level(NamedTuple):
    """The noise level of each sample of a batch."""

    sigma: Tensor
    """Weight of the noise, float32 [batch]."""
    timestep: Tensor
    """Timestep for the model, [batch]."""


class Objective(Protocol):
    """The training objective of a family."""

    sampling: str
    """Default distribution of `u`, one of `SAMPLINGS`."""

    def level(self, u: Tensor, tokens: int) -> Level:
        """The noise levels for `u`, float32 [batch], of samples with `tokens` tokens each."""
        ...

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The noisy sample, which is the model's input."""
        ...

    def loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, float32 [batch]: `weighted_mean` of its squared errors with `mask`."""
        ...


class Shift(Protocol):
    """The timestep shift as a function of the number of tokens. Above 1, it moves noise levels towards pure noise."""

    def __call__(self, tokens: int) -> float: ...


class RectifiedFlow:
    """Rectified flow: from `(1 - sigma) * clean + sigma * noise`, the model predicts the velocity `noise - clean`.

    Args:
        shift: timestep shift of the model's sampler; 1 leaves `u` unchanged.
        shifted_timestep: whether the timestep is computed from the noise level after the shift, or before it.
    """

    sampling = "logit_normal"

    def __init__(self, shift: Shift, shifted_timestep: bool = True) -> None:
        self.shift = shift
        self.shifted_timestep = shifted_timestep

    def level(self, u: Tensor, tokens: int) -> Level:
        shift = self.shift(tokens)
        sigma = shift * u / (1 + (shift - 1) * u)
        return Level(sigma, (sigma if self.shifted_timestep else u) * NUM_TRAIN_TIMESTEPS)

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        return torch.lerp(clean, noise, _per_sample(level.sigma, clean))

    def loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        return weighted_mean((prediction.float() - (noise - clean)).square(), mask)


class Diffusion(abc.ABC):
    """Diffusion with a fixed schedule: the model gets `alpha * clean + sigma * noise`, and predicts a `target`.

    Args:
        alphas_cumprod: the scheduler's `alpha ** 2` for each timestep, [num_train_timesteps].
        min_snr_gamma: weight of the loss by the signal-to-noise ratio `snr`, `min(snr, gamma)` times the squared error
            of the clean sample (https://arxiv.org/abs/2303.09556). None: the squared error of the target.
    """

    sampling = "uniform"

    def __init__(self, alphas_cumprod: Tensor, min_snr_gamma: float | None = None) -> None:
        self.alphas_cumprod = alphas_cumprod.float()
        self.min_snr_gamma = min_snr_gamma

    @abc.abstractmethod
    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the model predicts."""

    @abc.abstractmethod
    def weight(self, snr: Tensor, gamma: float) -> Tensor:
        """The weight of the target's squared error for `min_snr_gamma`."""

    def level(self, u: Tensor, tokens: int) -> Level:
        count = len(self.alphas_cumprod)
        timestep = (u * count).long().clamp(0, count - 1)
        return Level((1 - to_device(self.alphas_cumprod, u)[timestep]).sqrt(), timestep)

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        sigma = _per_sample(level.sigma, clean)
        return (1 - sigma.square()).sqrt() * clean + sigma * noise

    def loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        sigma = _per_sample(level.sigma, clean)
        target = self.target(clean, noise, (1 - sigma.square()).sqrt(), sigma)
        found = weighted_mean((prediction.float() - target).square(), mask)
        if self.min_snr_gamma is None:
            return found
        return found * self.weight(1 / level.sigma.square() - 1, self.min_snr_gamma)


class VPrediction(Diffusion):
    """V-prediction: the target is `alpha * noise - sigma * clean`.

    Its squared error is that of the clean sample, weighted by `1 / sigma ** 2`, but has no division by a sigma near
    zero.
    """

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * clean

    def weight(self, snr: Tensor, gamma: float) -> Tensor:
        return snr.clamp(max=gamma) / (snr + 1)


class EpsilonPrediction(Diffusion):
    """Prediction of the noise. Its squared error is that of the clean sample, weighted by `snr`."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def weight(self, snr: Tensor, gamma: float) -> Tensor:
        return (gamma / snr).clamp(max=1)  # 1 without any signal


def weighted_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each sample's errors over all channels, frames, rows and columns, weighted by a mask:
    `sum(mask * errors) / sum(mask)`.

    Args:
        errors: [batch, channels, frames, height, width].
        mask: weights from 0, in a shape that broadcasts to that of `errors`, not zero everywhere in a sample. None:
            all are 1.

    Returns:
        [batch].
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    mask = mask.to(errors.dtype).expand_as(errors)
    return (mask * errors).flatten(1).sum(1) / mask.flatten(1).sum(1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def scheduler_shift(config: Mapping[str, Any]) -> Shift:
    """The shift in a flow-matching scheduler's configuration, either constant or growing with the number of tokens.

    Raises:
        TrainingError: an unknown `time_shift_type`.
    """
    if not config.get("use_dynamic_shifting", False):
        fixed = float(config.get("flow_shift") or config.get("shift") or 1.0)
        return lambda tokens: fixed

    def mu(tokens: int) -> float:
        base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return base + (most - base) * (tokens - base_tokens) / (max_tokens - base_tokens)

    return dynamic_shift(mu, config.get("time_shift_type", "exponential"))


def dynamic_shift(mu: Shift, time_shift_type: str) -> Shift:
    """The shift of a scheduler whose `mu` depends on the number of tokens. Raises TrainingError for an unknown type."""
    if time_shift_type == "exponential":
        return lambda tokens: math.exp(mu(tokens))
    if time_shift_type == "linear":
        return mu
    raise TrainingError(
        f"the scheduler's time_shift_type is {time_shift_type!r}; accepted are 'exponential' and 'linear'. Give the "
        "shift as a number with --shift."
    )


def sample_u(
    sampling: str,
    generators: Sequence[torch.Generator],
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    levels: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Draws the noise level `u` of each sample, before any shift.

    Args:
        sampling: "uniform"; "logit_normal", which prefers middle levels; or "mode", which prefers middle levels but
            also draws the ends (https://arxiv.org/abs/2403.03206).
        generators: a generator for each sample.
        logit_mean, logit_std: mean and standard deviation of the normal distribution of "logit_normal".
        mode_scale: scale of "mode"; 0 is uniform.
        levels: lowest and highest `u`. Draws outside of them are repeated.

    Returns:
        float32 [samples] in [0, 1].

    Raises:
        TrainingError: an unknown sampling, or one that hardly ever draws from `levels`.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    if sampling not in SAMPLINGS:
        raise TrainingError(f"timestep_sampling={sampling!r}: accepted are {', '.join(map(repr, SAMPLINGS))}.")
    low, high = levels

    def draw(generator: torch.Generator) -> Tensor:
        for _ in range(MOST_DRAWS):
            drawn = compute_density_for_timestep_sampling(
                sampling, 1, logit_mean, logit_std, mode_scale, generator=generator
            )
            u: Tensor = drawn.clamp(0, 1)
            if low <= u.item() <= high:
                return u
        raise TrainingError(
            f"timestep_sampling={sampling!r} hardly ever draws a noise level from {low:.3f} to {high:.3f}, those of "
            "the trained expert. Give --timestep_sampling uniform, or another --logit_mean."
        )

    return torch.cat([draw(each) for each in generators])
