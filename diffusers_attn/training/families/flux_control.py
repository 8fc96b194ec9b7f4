"""FLUX.1 with a control image, such as edges or depth: its latents are further channels of the noisy image's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.conditions import Wanted
from .flux_kontext import FluxReference


class FluxControl(FluxReference):
    """`FluxControlPipeline` with a `FluxTransformer2DModel` of twice the channels, such as FLUX.1-Canny-dev."""

    pipelines = ("FluxControlPipeline",)
    example_conditions: ClassVar[Mapping[str, Wanted]] = {"control": Wanted()}
    image_argument = "control_image"

    @property
    def input_channels(self) -> int | None:
        latents = super().input_channels
        return None if latents is None else 2 * latents

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        inputs = super().inputs(noisy, timestep, text)
        control = self.pack(text["reference"].to(noisy.dtype))
        return {**inputs, "hidden_states": torch.cat([inputs["hidden_states"], control], dim=2)}
