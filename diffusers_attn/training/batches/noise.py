"""The random tensors of a micro-batch, drawn by the loader's threads.

Drawing a video's noise on the CPU takes as long as many kernels of a GPU. The threads draw it ahead of time and put it
into page-locked memory, from which copies to the GPU are asynchronous. The generators depend only on seed, step and
sample (see `randomness`), so the values do not depend on which thread draws them, or when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..families.denoising import draw
from ..loss import sample_u
from ..model.experts import at_level
from ..randomness import SampleRandomness, generator
from ..settings.config import TrainConfig


class Noise:
    """Adds the random tensors to a batch of `LatentLoader`, as its argument `finish`.

    The batch gets an entry "drawn": what `denoising.draw` returns, and the noise levels "u", float32 [batch]; and an
    entry "trained": the transformer that this step trains, by component name. If there are several, a noise level is
    drawn for each step, and the transformer of this level trains in it. So each gets whole batches, and the noise
    levels of all steps have the distribution that one transformer would get.

    Args:
        config: settings with the seed and the parameters of the distribution of `u`.
        sampling: distribution of `u`, one of `SAMPLINGS`.
        levels: lowest and highest `u` of each trained transformer, by component name.
        pin: whether to copy all tensors of the batch to page-locked memory.
    """

    def __init__(
        self, config: TrainConfig, sampling: str, levels: Mapping[str, tuple[float, float]], pin: bool
    ) -> None:
        self.config, self.sampling, self.levels, self.pin = config, sampling, levels, pin

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        random = SampleRandomness(config.seed, batch["step"], batch["positions"])
        drawn = draw(batch, random)
        trained = self._trained(batch["step"])
        drawn["u"] = self._levels(random.generators("level"), self.levels[trained])
        return self._pinned({**batch, "drawn": drawn, "trained": trained})

    def _trained(self, step: int) -> str:
        """The transformer that a step trains, the same on all processes."""
        if len(self.levels) == 1:
            return next(iter(self.levels))
        return at_level(self.levels, self._levels([generator(self.config.seed, "train", "expert", step)]).item())

    def _levels(self, generators: Sequence[torch.Generator], levels: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        config = self.config
        return sample_u(self.sampling, generators, config.logit_mean, config.logit_std, config.mode_scale, levels)

    def _pinned(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._pinned(each) for name, each in value.items()}
        return value.pin_memory() if self.pin and isinstance(value, Tensor) else value
