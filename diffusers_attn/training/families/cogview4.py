"""CogView4: images; captions padded to a multiple of 16 tokens; the size and the unshifted noise level are inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..loss import Objective, RectifiedFlow, dynamic_shift, scheduler_shift
from ..transfers import to_device
from .base import part_of
from .images import ImageFamily


class CogView4(ImageFamily):
    """`CogView4Pipeline` with a `CogView4Transformer2DModel`.

    `encode_text` pads to the longest caption of a call, and neither the text encoder nor the transformer masks padding.
    So captions should be encoded one at a time.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 1024
    pipelines = ("CogView4Pipeline",)

    def make_objective(self) -> Objective:
        # The pipeline passes its own timesteps to the scheduler, which shifts only the noise levels.
        fixed, config = self.shift, self.pipeline.scheduler.config
        if fixed is not None:
            return RectifiedFlow(lambda tokens: fixed, shifted_timestep=False)
        if not config.get("use_dynamic_shifting", False):
            return RectifiedFlow(scheduler_shift(config), shifted_timestep=False)
        base_tokens = config.get("base_image_seq_len", 256)
        base, most = config.get("base_shift", 0.25), config.get("max_shift", 0.75)

        def mu(tokens: int) -> float:
            return base + most * math.sqrt(tokens / base_tokens)

        return RectifiedFlow(dynamic_shift(mu, config.get("time_shift_type", "exponential")), shifted_timestep=False)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        batch, _, _, height, width = noisy.shape
        factor = self.pipeline.vae_scale_factor
        size = to_device(torch.tensor([[height * factor, width * factor]]), noisy).expand(batch, 2)
        return {
            "hidden_states": noisy.squeeze(2),
            "encoder_hidden_states": text["prompt_embeds"],
            "timestep": timestep,
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One part per example if the data's captions have different lengths, since the transformer would attend to
        padding. This is decided from all data, so that all processes have equally many parts."""
        mask = batch.get("prompt_embeds_mask")
        if mask is None:
            return [dict(batch)]
        parts = []
        for i, length in enumerate(mask.sum(1).tolist()):
            part = part_of(batch, i)
            part["prompt_embeds"] = part["prompt_embeds"][:, :length]
            parts.append(part)
        return parts

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unsqueeze(2)
