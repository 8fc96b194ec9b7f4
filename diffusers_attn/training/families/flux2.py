"""FLUX.2: images; latents in patches of 2 x 2, standardised per channel; coordinates of tokens are inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from ..loss import Objective, RectifiedFlow, dynamic_shift
from ..transfers import to_device
from .base import Family

STEPS = 50
"""Number of steps, the pipelines' default, for which the sampler's shift is taken. It depends on that number."""


class Flux2(Family):
    """`Flux2Pipeline` (dev) or `Flux2KleinPipeline`, with a `Flux2Transformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip
    text_length = 512
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    provided_inputs = ("guidance_embeds",)
    packed = 4

    def make_objective(self) -> Objective:
        if self.shift is not None:
            fixed = self.shift
            return RectifiedFlow(lambda tokens: fixed)
        return RectifiedFlow(dynamic_shift(lambda tokens: compute_empirical_mu(tokens, STEPS), "exponential"))

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def from_vae(self, latents: Tensor) -> Tensor:
        """The VAE's latents in patches: `[batch, 4 * channels, 1, height / 2, width / 2]`."""
        return self.pipeline._patchify_latents(latents).unsqueeze(2)

    def normalise(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (
            to_device(each, latents).view(1, -1, 1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()

    def tokens(self, shape: Sequence[int]) -> int:
        return shape[-2] * shape[-1]

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        pipeline, latents, words = self.pipeline, noisy.squeeze(2), text["prompt_embeds"]
        guidance = latents.new_full((latents.shape[0],), self.guidance, dtype=torch.float32)
        return {
            "hidden_states": pipeline._pack_latents(latents),
            "timestep": timestep / 1000,
            "guidance": guidance if self.config.guidance_embeds else None,
            "encoder_hidden_states": words,
            "txt_ids": pipeline._prepare_text_ids(words).to(words.device),
            "img_ids": pipeline._prepare_latent_ids(latents).to(latents.device),
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unflatten(1, (shape[-2], shape[-1])).movedim(-1, 1).unsqueeze(2)

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        # A guidance-distilled model has guidance_scale as its input, and no negative prompt.
        return super().prompt_arguments(prompt, negative_prompt, guided and not self.config.guidance_embeds)
