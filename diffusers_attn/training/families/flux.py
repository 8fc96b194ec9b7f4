"""FLUX.1: images; two text encoders; latents packed 2 x 2; guidance-distilled models have a guidance input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..transfers import to_device
from .base import Family
from .latents import patches, shifted_and_scaled


class Flux(Family):
    """`FluxPipeline` with a `FluxTransformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text_length = 512
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    provided_inputs: ClassVar[tuple[str, ...]] = ("guidance_embeds",)
    packed = 4
    negative_prompts = False
    encoded: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def normalise(self, latents: Tensor) -> Tensor:
        return shifted_and_scaled(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, 2)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        words = text["prompt_embeds"]
        return {
            "hidden_states": self.pack(noisy),
            "timestep": timestep / 1000,
            "encoder_hidden_states": words,
            "txt_ids": words.new_zeros(words.shape[1], 3),
            "img_ids": self.coordinates(noisy),
            **self.conditions(noisy, text),
        }

    def pack(self, latents: Tensor) -> Tensor:
        """Packs latents [batch, channels, 1, height, width] to tokens [batch, tokens, 4 * channels]."""
        batch, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, batch, channels, height, width)

    def coordinates(self, latents: Tensor) -> Tensor:
        """The coordinates of the tokens of `pack`, [tokens, 3]."""
        batch, _, _, height, width = latents.shape
        here = torch.device("cpu")
        ids = self.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, here, latents.dtype)
        return to_device(ids, latents)

    def conditions(self, noisy: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the transformer's forward that Chroma does not share."""
        guidance = noisy.new_full((len(noisy),), self.guidance, dtype=torch.float32)
        return {
            "guidance": guidance if self.config.guidance_embeds else None,
            "pooled_projections": text["pooled_prompt_embeds"],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(output, shape[-2] * factor, shape[-1] * factor, factor).unsqueeze(2)
