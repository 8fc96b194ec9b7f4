"""HunyuanVideo: videos of 4n + 1 frames; two text encoders, one with padding that is masked; a guidance input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .hunyuan import HunyuanFamily


class HunyuanVideo(HunyuanFamily):
    """`HunyuanVideoPipeline` with a `HunyuanVideoTransformer3DModel`."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    text_length = 256
    pipelines = ("HunyuanVideoPipeline",)
    provided_inputs = ("guidance_embeds",)
    encoded = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    negative_prompts = False

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        guidance = noisy.new_full((len(noisy),), 1000 * self.guidance, dtype=torch.float32)
        return {
            "hidden_states": noisy,
            "timestep": timestep,
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_attention_mask"].to(noisy.dtype),
            "pooled_projections": text["pooled_prompt_embeds"],
            "guidance": guidance if self.config.guidance_embeds else None,
        }
