"""An exponential moving average of the adapter (diffusers' EMAModel) that any number of processes can load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .lora import full_copy, sharded_like, trained_parameters


class AdapterAverage:
    """The moving average of a model's trained parameters.

    Args:
        transformer: a model with an adapter, prepared by Accelerate.
        decay: decay per step; EMAModel uses a smaller one in the first steps.
    """

    def __init__(self, transformer: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = trained_parameters(transformer)
        self._average = EMAModel(self._parameters.values(), decay=decay)

    def step(self) -> None:
        """Updates the average with the current parameters."""
        self._average.step(self._parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """The full average by parameter name, on the CPU. With FSDP2 every process must call this."""
        return {name: full_copy(each) for name, each in zip(self._parameters, self._average.shadow_params)}

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return self._average.optimization_step

    def load(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Restores values that `weights` and `steps` returned."""
        with torch.no_grad():
            for (name, parameter), average in zip(self._parameters.items(), self._average.shadow_params):
                average.copy_(sharded_like(weights[name].to(average.dtype), parameter))
        self._average.optimization_step = steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the model's parameters by the average within this context."""
        own = [parameter.data.clone() for parameter in self._parameters.values()]
        self._average.copy_to(self._parameters.values())
        try:
            yield
        finally:
            for parameter, before in zip(self._parameters.values(), own):
                parameter.data.copy_(before)
