"""FLUX.1: images; two text encoders; latents packed 2 x 2; guidance-distilled models have a guidance input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Family


class Flux(Family):
    """`FluxPipeline` with a `FluxTransformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text_length = 512
    pipelines = ("FluxPipeline",)
    provided_inputs = ("guidance_embeds",)
    packed = 4

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            text, pooled, _ = self.pipeline.encode_prompt(
                captions, max_sequence_length=self.max_sequence_length, device=self.text_device
            )
        return {"prompt_embeds": text.cpu(), "pooled_prompt_embeds": pooled.cpu()}

    def normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // 2) * (shape[-1] // 2)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        batch, channels, _, height, width = noisy.shape
        words = text["prompt_embeds"]
        guidance = noisy.new_full((batch,), self.guidance, dtype=torch.float32)
        return {
            "hidden_states": self.pipeline._pack_latents(noisy, batch, channels, height, width),
            "timestep": timestep / 1000,
            "guidance": guidance if self.config.guidance_embeds else None,
            "pooled_projections": text["pooled_prompt_embeds"],
            "encoder_hidden_states": words,
            "txt_ids": words.new_zeros(words.shape[1], 3),
            "img_ids": self.pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, noisy.device, noisy.dtype
            ),
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(output, shape[-2] * factor, shape[-1] * factor, factor).unsqueeze(2)

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        # guidance_scale is an input of the model. A negative prompt needs true_cfg_scale, which is not used.
        return self.encode_text([prompt])
