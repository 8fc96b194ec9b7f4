"""CogVideoX 1.0 and 1.5: videos; v-prediction; frames before channels; rotary embeddings are an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..loss import Objective, VPrediction
from .base import Family
from .latents import patches


class CogVideoX(Family):
    """`CogVideoXPipeline` with a `CogVideoXTransformer3DModel`."""

    kind = "video"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 226
    fps = 8.0
    pipelines = ("CogVideoXPipeline",)
    prediction_types = ("v_prediction",)

    def check(self) -> None:
        self.refuse_shift()
        if self.config.patch_size_t is not None:  # 1.5
            self.fps = 16.0

    def make_objective(self) -> Objective:
        return VPrediction(self.pipeline.scheduler.alphas_cumprod, self.min_snr_gamma)

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.config.patch_size

    @property
    def frame_rule(self) -> tuple[int, int]:
        # 1.5 packs latent frames in groups of patch_size_t. Accepted are numbers 4n + 1 that fill the groups.
        factor, pack = self.pipeline.vae_scale_factor_temporal, self.config.patch_size_t or 1
        return factor * pack, factor * (pack - 1) + 1

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size, self.config.patch_size_t or 1)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        *_, frames, height, width = noisy.shape
        factor = self.pipeline.vae_scale_factor_spatial
        rotary = self.pipeline._prepare_rotary_positional_embeddings(
            height * factor, width * factor, frames, noisy.device
        )
        return {
            "hidden_states": noisy.transpose(1, 2),
            "encoder_hidden_states": text["prompt_embeds"],
            "timestep": timestep,
            "image_rotary_emb": rotary if self.config.use_rotary_positional_embeddings else None,
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.transpose(1, 2)
