"""HunyuanVideo 1.5: videos of 4n + 1 frames; two text encoders with padding that is masked; no image given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..settings.flag_names import option
from .hunyuan import HunyuanFamily


class HunyuanVideo15(HunyuanFamily):
    """`HunyuanVideo15Pipeline` with a `HunyuanVideo15Transformer3DModel`."""

    # Not add_q_proj and to_add_out: the model discards the text's output of the last block.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    text_length = 1000
    pipelines = ("HunyuanVideo15Pipeline",)
    encoded = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")

    def _text_length(self, wanted: int | None) -> int:
        fixed = int(self.pipeline.tokenizer_max_length)
        if wanted not in (None, fixed):
            raise TrainingError(
                f"{option('max_sequence_length', wanted)}: this pipeline always encodes {fixed} text tokens. Leave it "
                "out."
            )
        return fixed

    @property
    def input_channels(self) -> int | None:
        latents = super().input_channels
        return None if latents is None else 2 * latents + 1  # a given image, and a mask of its frames

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        pipeline = self.pipeline
        given, mask = pipeline.prepare_cond_latents_and_mask(noisy, noisy.dtype, noisy.device)
        return {
            "hidden_states": torch.cat([noisy, given, mask], dim=1),
            "timestep": timestep.to(noisy.dtype),
            "image_embeds": noisy.new_zeros(
                len(noisy), pipeline.vision_num_semantic_tokens, pipeline.vision_states_dim
            ),
            "encoder_hidden_states": text["prompt_embeds"],
            "encoder_attention_mask": text["prompt_embeds_mask"],
            "encoder_hidden_states_2": text["prompt_embeds_2"],
            "encoder_attention_mask_2": text["prompt_embeds_mask_2"],
        }

    # The scale of guidance is one of the pipeline's guider, not an argument of its call.

    @property
    def default_guidance(self) -> float:
        return float(self.pipeline.guider.guidance_scale)

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        self.pipeline.guider = self.pipeline.guider.new(guidance_scale=scale)
        return {}
