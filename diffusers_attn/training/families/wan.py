"""Wan 2.1 and Wan2.2-TI2V-5B: videos of 4n + 1 frames; text padded with zeros; latents standardised per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .base import Family, standardised


class Wan(Family):
    """`WanPipeline` with one `WanTransformer3DModel`."""

    kind = "video"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 512
    pipelines = ("WanPipeline",)
    refused_components: ClassVar = {
        "transformer_2": "it has one transformer for high noise levels and one for low ones, which cannot be trained "
        "together. Accepted are pipelines with one transformer: Wan 2.1 and Wan2.2-TI2V-5B."
    }

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.config.patch_size[-1]

    @property
    def frame_rule(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, 1

    def normalise(self, latents: Tensor) -> Tensor:
        return standardised(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        patch = self.config.patch_size
        return (shape[-3] // patch[0]) * (shape[-2] // patch[1]) * (shape[-1] // patch[2])

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.pipeline.config.expand_timesteps:  # one timestep per token, since the first frame may be given
            timestep = timestep[:, None].expand(-1, self.tokens(noisy.shape))
        return {"hidden_states": noisy, "timestep": timestep, "encoder_hidden_states": text["prompt_embeds"]}
