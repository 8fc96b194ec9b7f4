"""Qwen-Image: images; captions of any length, whose padding the transformer masks; latents packed 2 x 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Family
from .latents import patches, standardised


class QwenImage(Family):
    """`QwenImagePipeline` with a `QwenImageTransformer2DModel`."""

    kind = "image"
    # Not add_q_proj and to_add_out: the model discards the text's output of the last block, where these would have no
    # gradient, which DDP takes for an error.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    text_length = 1024
    guidance_argument = "true_cfg_scale"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    packed = 4

    @property
    def text_limit(self) -> int | None:
        return int(self.pipeline.tokenizer_max_length)

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def normalise(self, latents: Tensor) -> Tensor:
        return standardised(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, 2)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        batch, channels, _, height, width = noisy.shape
        return {
            "hidden_states": self.pipeline._pack_latents(noisy, batch, channels, height, width),
            "timestep": timestep / 1000,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_hidden_states_mask": text.get("prompt_embeds_mask"),
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(output, shape[-2] * factor, shape[-1] * factor, factor)

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        arguments = super().prompt_arguments(prompt, negative_prompt, guided)
        # Without a mask the pipeline warns that it takes all tokens to be valid, as they are.
        masks = {f"{name}_mask": torch.ones(each.shape[:2], dtype=torch.long) for name, each in arguments.items()}
        return arguments | masks
