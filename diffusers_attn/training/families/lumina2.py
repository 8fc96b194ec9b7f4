"""Lumina Image 2.0: images; the time runs from noise to image; a system prompt before prompts; padded text with a
mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..loss import Objective, RectifiedFlow, scheduler_shift
from .images import ImageFamily
from .instructed import InstructedFamily


class Lumina2(InstructedFamily, ImageFamily):
    """`Lumina2Pipeline` with a `Lumina2Transformer2DModel`."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 256
    pipelines = ("Lumina2Pipeline",)

    def make_objective(self) -> Objective:
        if self.shift is not None:
            return super().make_objective()
        # The pipeline takes a dynamic shift from the number of channels, not from that of tokens.
        shift, channels = scheduler_shift(self.pipeline.scheduler.config), self.config.in_channels
        return RectifiedFlow(lambda tokens: shift(channels))

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": noisy.squeeze(2),
            "timestep": 1 - timestep / 1000,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_attention_mask"],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        # The model predicts the velocity from noise to image.
        return -output.unsqueeze(2)
