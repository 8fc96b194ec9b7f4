"""Krea 2: images; Qwen-Image's latents, packed 2 x 2; text from several layers of the encoder; padding is masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..loss import Objective, RectifiedFlow, dynamic_shift
from .base import Family
from .latents import patches, standardised

DISTILLED_MU = 1.15
"""`mu` of the pipeline's call for a distilled model, whatever the number of tokens."""


class Krea2(Family):
    """`Krea2Pipeline` with a `Krea2Transformer2DModel`."""

    kind = "image"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 512
    pipelines = ("Krea2Pipeline",)
    encoded = ("prompt_embeds", "prompt_embeds_mask")

    def make_objective(self) -> Objective:
        pipeline, config = self.pipeline, self.pipeline.scheduler.config
        if self.shift is not None or not (pipeline.config.is_distilled and config.use_dynamic_shifting):
            return super().make_objective()
        return RectifiedFlow(dynamic_shift(lambda tokens: DISTILLED_MU, config.time_shift_type))

    @property
    def input_channels(self) -> int | None:
        latents = super().input_channels
        return None if latents is None else latents * self.pipeline.patch_size**2

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    def normalise(self, latents: Tensor) -> Tensor:
        return standardised(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.pipeline.patch_size)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        batch, channels, _, height, width = noisy.shape
        pipeline, words, patch = self.pipeline, text["prompt_embeds"], self.pipeline.patch_size
        return {
            "hidden_states": pipeline._pack_latents(noisy.squeeze(2), batch, channels, height, width),
            "encoder_hidden_states": words,
            "timestep": (timestep / 1000).to(noisy.dtype),
            "position_ids": pipeline.prepare_position_ids(
                words.shape[1], height // patch, width // patch, noisy.device
            ),
            "encoder_attention_mask": text["prompt_embeds_mask"],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(output, shape[-2] * factor, shape[-1] * factor)

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        # The pipeline guides from a scale above 0.
        return super().prompt_arguments(prompt, negative_prompt, guided=True)
