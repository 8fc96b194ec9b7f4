"""What HunyuanVideo and HunyuanVideo 1.5 share: videos of 4n + 1 frames, and their latents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Family
from .latents import patches


class HunyuanFamily(Family):
    """Latents of frames, in patches of frames and of pixels."""

    kind = "video"
    fps = 24.0

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.config.patch_size

    @property
    def frame_rule(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, 1

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size, self.config.patch_size_t)
