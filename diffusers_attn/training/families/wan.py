"""Wan 2.1 and 2.2: videos of 4n + 1 frames; text padded with zeros; latents standardised per channel; one transformer,
or one for high and one for low noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..loss import scheduler_shift
from .base import Family
from .latents import patches, standardised


class Wan(Family):
    """`WanPipeline` with one or two `WanTransformer3DModel`."""

    kind = "video"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 512
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)

    def check(self) -> None:
        if self.pipeline.config.get("expand_timesteps"):  # TI2V-5B
            self.fps = 24.0

    @property
    def levels(self) -> dict[str, tuple[float, float]]:
        if self.expert is None:
            return super().levels
        # The sampler uses the expert for high noise levels from this one on. The shift does not depend on tokens.
        sigma = self.pipeline.config.boundary_ratio
        shift = self.shift or scheduler_shift(self.pipeline.scheduler.config)(1)
        boundary = sigma / (shift - (shift - 1) * sigma)
        each = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
        return {name: each[name] for name in self.trained}

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.config.patch_size[-1]

    @property
    def frame_rule(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, 1

    def normalise(self, latents: Tensor) -> Tensor:
        return standardised(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        frames, size, _ = self.config.patch_size
        return patches(shape, size, frames)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.pipeline.config.get("expand_timesteps"):  # one timestep per token, since the first frame may be given
            timestep = timestep[:, None].expand(-1, self.tokens(noisy.shape))
        return {"hidden_states": noisy, "timestep": timestep, "encoder_hidden_states": text["prompt_embeds"]}
