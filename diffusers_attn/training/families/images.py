"""Families of images whose latents an `AutoencoderKL` makes, and whose transformer divides them into square patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Family
from .latents import patches, shifted_and_scaled


class ImageFamily(Family):
    """Latents without frames, in patches of the transformer's `patch_size`."""

    kind = "image"
    vae_has_frames = False

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.config.patch_size

    def normalise(self, latents: Tensor) -> Tensor:
        return shifted_and_scaled(latents, self.pipeline.vae.config)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size)
