"""LTX-Video: videos of 8n + 1 frames; padded text with a mask; the frame rate is an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..transfers import to_device
from .base import Family
from .latents import patches


class LTXVideo(Family):
    """`LTXPipeline` with an `LTXVideoTransformer3DModel`.

    The transformer gets `fps` as the frame rate of all videos.
    """

    kind = "video"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 128
    fps = 25.0
    pipelines = ("LTXPipeline",)
    encoded = ("prompt_embeds", "prompt_attention_mask")

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_spatial_compression_ratio * self.config.patch_size

    @property
    def frame_rule(self) -> tuple[int, int]:
        # The frames of a video after its first one fill groups, and the groups of latent frames fill patches.
        factor, patch = self.pipeline.vae_temporal_compression_ratio, self.config.patch_size_t
        return factor * patch, factor * (patch - 1) + 1

    def normalise(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = to_device(vae.latents_mean, latents), to_device(vae.latents_std, latents)
        return self.pipeline._normalize_latents(latents, mean, std, vae.config.scaling_factor)

    def tokens(self, shape: Sequence[int]) -> int:
        return patches(shape, self.config.patch_size, self.config.patch_size_t)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        pipeline = self.pipeline
        space = pipeline.vae_spatial_compression_ratio
        return {
            "hidden_states": pipeline._pack_latents(noisy, self.config.patch_size, self.config.patch_size_t),
            "encoder_hidden_states": text["prompt_embeds"],
            "timestep": timestep,
            "encoder_attention_mask": text["prompt_attention_mask"],
            "num_frames": noisy.shape[-3],
            "height": noisy.shape[-2],
            "width": noisy.shape[-1],
            "rope_interpolation_scale": (pipeline.vae_temporal_compression_ratio / self.fps, space, space),
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return self.pipeline._unpack_latents(
            output, *shape[-3:], patch_size=self.config.patch_size, patch_size_t=self.config.patch_size_t
        )

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        return {**super().size_arguments(frames, height, width), "frame_rate": self.fps}
