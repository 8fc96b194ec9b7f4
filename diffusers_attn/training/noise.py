"""What is random about a micro-batch, drawn by the threads that read it.

A video's noise takes a CPU as long as many of a GPU's kernels. Drawn a little ahead, and put where a copy to a GPU does
not keep the CPU waiting, it costs a step nothing. It comes from the generators that it always comes from (see
`randomness`), so that who draws it, and when, does not matter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import TrainConfig
from .loss import sample_u
from .randomness import SampleRandomness


class Noise:
    """For `LatentLoader`: gives a batch "drawn", a dict of what is drawn for it, float32: "posterior" and "noise", of
    the latents' shape, and "u", `[batch]`.

    Args:
        config: the seed, and how `u` is distributed.
        sampling: of `u`, one of `SAMPLINGS`.
        pin: whether all tensors are put into page-locked memory.
    """

    def __init__(self, config: TrainConfig, sampling: str, pin: bool) -> None:
        self.config, self.sampling, self.pin = config, sampling, pin

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        random = SampleRandomness(config.seed, batch["step"], batch["positions"])
        shape = batch["latents_mean"].shape[1:]
        drawn = {what: random.normal(what, shape) for what in ("posterior", "noise")}
        drawn["u"] = sample_u(
            self.sampling, random.generators("level"), config.logit_mean, config.logit_std, config.mode_scale
        )
        return self._pinned({**batch, "drawn": drawn})

    def _pinned(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._pinned(each) for name, each in value.items()}
        return value.pin_memory() if self.pin and isinstance(value, Tensor) else value
