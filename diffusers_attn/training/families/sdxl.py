"""Stable Diffusion XL: images; a UNet that predicts the noise or v; text of 77 tokens; sizes are an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import TrainingError
from ..loss import EpsilonPrediction, Objective, VPrediction
from ..settings.flag_names import option
from ..transfers import to_device
from .base import Family
from .latents import patches

TOKENS = 77
"""Number of tokens of a caption: as many as CLIP takes."""


class StableDiffusionXL(Family):
    """`StableDiffusionXLPipeline` with a `UNet2DConditionModel`.

    The UNet is told, as the pipeline tells it by default, that images had the size of their bucket and are not cropped.
    """

    kind = "image"
    component = "unet"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = TOKENS
    pipelines = ("StableDiffusionXLPipeline",)
    prediction_types = ("epsilon", "v_prediction")
    encoded = ("prompt_embeds", "", "pooled_prompt_embeds")
    encoding_arguments: ClassVar = {"num_images_per_prompt": 1}

    def check(self) -> None:
        self.refuse_shift()
        added = self.config.addition_embed_type
        if added != "text_time":
            raise TrainingError(
                f"the UNet's addition_embed_type is {added!r}, but that of Stable Diffusion XL is 'text_time'. Give a "
                "model of Stable Diffusion XL."
            )
        if not hasattr(self.pipeline.scheduler, "alphas_cumprod"):
            raise TrainingError(
                f"the pipeline's {type(self.pipeline.scheduler).__name__} has no alphas_cumprod, the noise levels at "
                "which the UNet was trained. Give a model with another scheduler, such as EulerDiscreteScheduler."
            )

    def make_objective(self) -> Objective:
        scheduler = self.pipeline.scheduler
        predicts = {"epsilon": EpsilonPrediction, "v_prediction": VPrediction}[scheduler.config.prediction_type]
        return predicts(scheduler.alphas_cumprod, self.min_snr_gamma)

    def _text_length(self, wanted: int | None) -> int:
        if wanted not in (None, TOKENS):
            raise TrainingError(
                f"{option('max_sequence_length', wanted)}: this pipeline always encodes {TOKENS} text tokens. Leave it "
                "out."
            )
        return TOKENS

    @property
    def size_multiple(self) -> int:
        # Sizes that all resolutions of the UNet divide.
        return self.pipeline.vae_scale_factor * 2 ** (len(self.config.block_out_channels) - 1)

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        found = super().encode_text(captions)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as the pipeline does it without a negative prompt
            empty = torch.tensor([not caption for caption in captions])
            for each in found.values():
                each[empty] = 0
        return found

    def normalise(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                to_device(torch.tensor(config[f"latents_{name}"]), latents).view(1, -1, 1, 1, 1)
                for name in ("mean", "std")
            )
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, 1)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
        sizes = to_device(torch.tensor([height, width, 0, 0, height, width]), noisy)  # original size, crop, size
        return {
            "sample": noisy.squeeze(2),
            "timestep": timestep,
            "encoder_hidden_states": text["prompt_embeds"],
            "added_cond_kwargs": {
                "text_embeds": text["pooled_prompt_embeds"],
                "time_ids": sizes.expand(len(noisy), -1),
            },
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unsqueeze(2)
