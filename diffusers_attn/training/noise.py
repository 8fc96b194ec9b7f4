"""The random tensors of a micro-batch, drawn by the loader's threads.

Drawing a video's noise on the CPU takes as long as many kernels of a GPU. The threads draw it ahead of time and put it
into page-locked memory, from which copies to the GPU are asynchronous. The generators depend only on seed, step and
sample (see `randomness`), so the values do not depend on which thread draws them, or when.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import TrainConfig
from .loss import sample_u
from .randomness import SampleRandomness


class Noise:
    """Adds the random tensors to a batch of `LatentLoader`, as its argument `finish`.

    The batch gets an entry "drawn": a dict of "posterior" and "noise", float32 with the latents' shape, and the noise
    levels "u", float32 [batch].

    Args:
        config: settings with the seed and the parameters of the distribution of `u`.
        sampling: distribution of `u`, one of `SAMPLINGS`.
        levels: lowest and highest `u`.
        pin: whether to copy all tensors of the batch to page-locked memory.
    """

    def __init__(self, config: TrainConfig, sampling: str, levels: tuple[float, float], pin: bool) -> None:
        self.config, self.sampling, self.levels, self.pin = config, sampling, levels, pin

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        random = SampleRandomness(config.seed, batch["step"], batch["positions"])
        shape = batch["latents_mean"].shape[1:]
        drawn = {what: random.normal(what, shape) for what in ("posterior", "noise")}
        drawn["u"] = sample_u(
            self.sampling,
            random.generators("level"),
            config.logit_mean,
            config.logit_std,
            config.mode_scale,
            self.levels,
        )
        return self._pinned({**batch, "drawn": drawn})

    def _pinned(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._pinned(each) for name, each in value.items()}
        return value.pin_memory() if self.pin and isinstance(value, Tensor) else value
