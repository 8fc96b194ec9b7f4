"""Z-Image: images and captions as lists with an item for each sample; the time runs from noise to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Family
from .latents import patches, shifted_and_scaled


class ZImage(Family):
    """`ZImagePipeline` with a `ZImageTransformer2DModel`."""

    kind = "image"
    vae_has_frames = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 512
    pipelines = ("ZImagePipeline",)

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            texts, _ = self.pipeline.encode_prompt(
                list(captions),  # which the pipeline writes to
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                device=self.text_device,
            )
        return {"prompt_embeds": torch.stack(texts).cpu()}

    def normalise(self, latents: Tensor) -> Tensor:
        return shifted_and_scaled(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, 2)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        words, mask = text["prompt_embeds"], text.get("prompt_embeds_mask")
        captions = list(words.unbind(0))
        if mask is not None:
            captions = [each[:length] for each, length in zip(captions, mask.sum(1).tolist(), strict=True)]
        return {"x": list(noisy.unbind(0)), "t": (1000 - timestep) / 1000, "cap_feats": captions}

    def prediction(self, output: Any, shape: Sequence[int]) -> Tensor:
        # The model predicts the velocity from noise to image.
        return -torch.stack(list(output))

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        # The pipeline guides from a scale above 0, and then needs a negative prompt.
        arguments = super().prompt_arguments(prompt, negative_prompt, guided=True)
        return {name: list(each.unbind(0)) for name, each in arguments.items()}
