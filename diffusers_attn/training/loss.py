"""What a model is asked to predict, from what, and how far off it was.

An objective makes a noisy sample from a clean one, noise and a number `u` in [0, 1] that says how much of it (1: noise
only), and measures a prediction. All of it in float32, each sample by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import TrainingError

SAMPLINGS = ("uniform", "logit_normal", "mode")


class Level(NamedTuple):
    """How noisy each sample of a batch is."""

    sigma: Tensor
    """float32 [batch]: the share of noise; of the v-prediction, its amount."""
    timestep: Tensor
    """[batch]: what the model is told."""


class Objective(Protocol):
    """What a family trains for."""

    sampling: str
    """how `u` is drawn where a user says nothing."""

    def level(self, u: Tensor, tokens: int) -> Level:
        """The noise levels for `u`, float32 [batch], of samples with so many tokens."""
        ...

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the model is shown."""
        ...

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The loss of each sample, float32 [batch]."""
        ...


class Shift(Protocol):
    """How much more of a sampler's time is spent at high noise, by the number of tokens."""

    def __call__(self, tokens: int) -> float: ...


class RectifiedFlow:
    """The model is shown `(1 - sigma) * clean + sigma * noise` and names the velocity, `noise - clean`.

    Args:
        shift: 1 leaves `u` as it is; more moves it towards noise, as the model's sampler does.
        shifted_timestep: whether the model is told the noise level as it is, or the one before the shift.
        num_train_timesteps: what the model calls 1.
    """

    sampling = "logit_normal"

    def __init__(self, shift: Shift, shifted_timestep: bool = True, num_train_timesteps: int = 1000) -> None:
        self.shift = shift
        self.shifted_timestep = shifted_timestep
        self.num_train_timesteps = num_train_timesteps

    def level(self, u: Tensor, tokens: int) -> Level:
        shift = self.shift(tokens)
        sigma = shift * u / (1 + (shift - 1) * u)
        return Level(sigma, (sigma if self.shifted_timestep else u) * self.num_train_timesteps)

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        return torch.lerp(clean, noise, _per_sample(level.sigma, clean))

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        return (prediction.float() - (noise - clean)).square().flatten(1).mean(1)


class VPrediction:
    """The model names the velocity of a variance-preserving process, `alpha * noise - sigma * clean`.

    Comparing the clean samples that follow from it, weighted by `1 / sigma ** 2`, is the same number: an error of the
    velocity is one of the clean sample times sigma. Written as it is here, nothing is divided by a sigma near zero.

    Args:
        alphas_cumprod: of the scheduler, [num_train_timesteps]: the share of the clean sample's variance, alpha ** 2.
    """

    sampling = "uniform"

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.float()

    def level(self, u: Tensor, tokens: int) -> Level:
        count = len(self.alphas_cumprod)
        timestep = (u * count).long().clamp(0, count - 1)
        return Level((1 - self.alphas_cumprod.to(u.device)[timestep]).sqrt(), timestep)

    def noisy(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        sigma = _per_sample(level.sigma, clean)
        return (1 - sigma.square()).sqrt() * clean + sigma * noise

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        sigma = _per_sample(level.sigma, clean)
        velocity = (1 - sigma.square()).sqrt() * noise - sigma * clean
        return (prediction.float() - velocity).square().flatten(1).mean(1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def scheduler_shift(config: Mapping[str, Any]) -> Shift:
    """The shift that a flow-matching scheduler's configuration says: a number, or one that grows with the resolution.

    Raises:
        TrainingError: it grows in a way that is not known.
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
    """The shift that a scheduler with a resolution-dependent `mu` applies. Raises TrainingError for an unknown type."""
    if time_shift_type == "exponential":
        return lambda tokens: float(torch.tensor(mu(tokens), dtype=torch.float64).exp())
    if time_shift_type == "linear":
        return mu
    raise TrainingError(
        f"the scheduler's time_shift_type is {time_shift_type!r}; known are 'exponential' and 'linear'. Give the "
        "shift as a number: --shift."
    )


def sample_u(
    sampling: str,
    generators: Sequence[torch.Generator],
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """How much noise each sample gets, float32 [samples] in [0, 1], before any shift.

    Args:
        sampling: "uniform"; "logit_normal", mostly in the middle; or "mode", with a heavy middle and no light ends.
        generators: one for each sample.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode".

    Raises:
        TrainingError: another sampling.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    if sampling not in SAMPLINGS:
        raise TrainingError(f"timestep_sampling={sampling!r}: accepted are {', '.join(map(repr, SAMPLINGS))}.")
    draws = [
        compute_density_for_timestep_sampling(sampling, 1, logit_mean, logit_std, mode_scale, generator=each)
        for each in generators
    ]
    return torch.cat(draws).clamp(0, 1)
