"""Stable Diffusion 3 and 3.5: images; up to three text encoders, whose padding is an input like other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .base import Family, patches, shifted_and_scaled


class SD3(Family):
    """`StableDiffusion3Pipeline` with an `SD3Transformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text_length = 256
    pipelines = ("StableDiffusion3Pipeline",)
    encoded = ("prompt_embeds", "", "pooled_prompt_embeds")
    encoding_arguments: ClassVar = {"prompt_2": None, "prompt_3": None}

    @property
    def text_limit(self) -> int:
        return 512  # T5 tokens that the pipeline accepts

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.config.patch_size

    def normalise(self, latents: Tensor) -> Tensor:
        return shifted_and_scaled(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": noisy.squeeze(2),
            "timestep": timestep,
            "encoder_hidden_states": text["prompt_embeds"],
            "pooled_projections": text["pooled_prompt_embeds"],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unsqueeze(2)
