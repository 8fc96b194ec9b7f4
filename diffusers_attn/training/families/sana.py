"""Sana: images; an autoencoder without a distribution of latents; an instruction before prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .instructed import InstructedFamily
from .latents import patches


class Sana(InstructedFamily):
    """`SanaPipeline` with a `SanaTransformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 300
    pipelines = ("SanaPipeline",)

    @property
    def encoding_arguments(self) -> Mapping[str, Any]:  # type: ignore[override]  # a property of the pipeline
        return {"complex_human_instruction": self.default_of_call("complex_human_instruction")}

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.config.patch_size

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        vae = self.pipeline.vae
        with torch.no_grad():
            latents = vae.encode(self.to_vae(pixels.to(vae.device, vae.dtype))).latent
        return {"latents_mean": self.from_vae(latents.float().cpu())}

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": noisy.squeeze(2),
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_attention_mask"],
            "timestep": timestep * self.config.timestep_scale,
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output[:, : shape[1]].unsqueeze(2)  # models with a learned variance return that, too

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        # Its default is "", which the pipeline refuses beside embeddings.
        return {**super().prompt_arguments(prompt, negative_prompt, guided), "negative_prompt": None}

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        # Otherwise the pipeline draws at the nearest of its own sizes, and scales the image.
        return {**super().size_arguments(frames, height, width), "use_resolution_binning": False}
