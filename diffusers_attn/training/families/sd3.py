"""Stable Diffusion 3 and 3.5: images; up to three text encoders, whose padding is an input like other tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .images import ImageFamily


class SD3(ImageFamily):
    """`StableDiffusion3Pipeline` with an `SD3Transformer2DModel`."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text_length = 256
    pipelines = ("StableDiffusion3Pipeline",)
    encoded = ("prompt_embeds", "", "pooled_prompt_embeds")
    encoding_arguments: ClassVar = {"prompt_2": None, "prompt_3": None}

    @property
    def text_limit(self) -> int:
        return 512  # T5 tokens that the pipeline accepts

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": noisy.squeeze(2),
            "timestep": timestep,
            "encoder_hidden_states": text["prompt_embeds"],
            "pooled_projections": text["pooled_prompt_embeds"],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unsqueeze(2)
