"""Chroma: images; FLUX.1's latents and coordinates; one text encoder, whose padding is masked but for one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .flux import Flux
from .latents import patches


class Chroma(Flux):
    """`ChromaPipeline` with a `ChromaTransformer2DModel`."""

    pipelines = ("ChromaPipeline",)
    provided_inputs = ()
    encoded = ("prompt_embeds", "", "prompt_attention_mask")
    negative_prompts = True

    def conditions(self, noisy: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        mask = text["prompt_attention_mask"]
        image = mask.new_ones(len(mask), patches(noisy.shape, 2))
        return {"attention_mask": torch.cat([mask, image], dim=1)}
