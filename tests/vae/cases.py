"""Small VAEs of diffusers, one of each kind, with an image or a video to encode and latents to decode.

Heights do not divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch


class Case(NamedTuple):
    """A VAE, and the shapes of its inputs."""

    make: Callable[[], Any]
    sample: tuple[int, ...]
    latents: tuple[int, ...]
    options: dict[str, Any] = {}
    """Arguments of `decode`."""


def _kl(**options: Any) -> Any:
    channels = (8, 16, 16)
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    )


def _flux2() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )


def _wan(**options: Any) -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **options,
    )


def _wan22() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _qwen() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _ltx2() -> Any:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=2,
        decoder_inject_noise=(False, False, False, False),
    )


def _ltx() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=2,
        timestep_conditioning=True,
        decoder_inject_noise=(True,) * 5,
    )


def _hunyuan() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def _hunyuan15() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def _hunyuan_image() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
        scaling_factor=1.0,
    )


def _cogvideox() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _mochi() -> Any:
    return diffusers.AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )


def _dc(downsample: str, upsample: str) -> Any:
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (5,), (5,)),
        decoder_qkv_multiscales=((), (5,), (5,)),
        downsample_block_type=downsample,
        upsample_block_type=upsample,
    )


def _tiny() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def _refiner() -> Any:
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, spatial_compression_ratio=4
    )


def _cosmos() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 16),
        decode_block_out_channels=(8, 8, 16),
        num_layers=1,
        attention_resolutions=(8,),
        resolution=32,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=[0.0] * 64,
        latents_std=[1.0] * 64,
    )


def _magvit() -> Any:
    return diffusers.AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def _temporal_decoder() -> Any:
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32), latent_channels=4
    )


def _kvae() -> Any:
    return diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1))


def _allegro() -> Any:
    """Works with tiles only."""
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.enable_tiling()
    vae.kernel, vae.stride = (8, 28, 16), (4, 24, 12)
    return vae


CASES = {
    "kl": Case(_kl, (2, 3, 28, 24), (2, 4, 7, 6)),
    "flux2": Case(_flux2, (1, 3, 20, 24), (1, 4, 5, 6)),
    "qwen": Case(_qwen, (1, 3, 1, 28, 16), (1, 4, 1, 7, 4)),
    "wan": Case(_wan, (1, 3, 5, 28, 16), (1, 4, 2, 7, 4)),
    "wan22": Case(_wan22, (1, 3, 5, 56, 32), (1, 4, 2, 7, 4)),
    "ltx": Case(_ltx, (1, 3, 9, 112, 32), (1, 8, 2, 7, 2), {"temb": torch.tensor([0.05], dtype=torch.float64)}),
    "ltx2": Case(_ltx2, (1, 3, 9, 112, 32), (1, 8, 2, 7, 2)),
    "hunyuan": Case(_hunyuan, (1, 3, 5, 56, 16), (1, 4, 2, 7, 2)),
    "hunyuan15": Case(_hunyuan15, (1, 3, 5, 28, 16), (1, 4, 2, 7, 4)),
    "hunyuan-image": Case(_hunyuan_image, (1, 3, 28, 16), (1, 4, 7, 4)),
    "cogvideox": Case(_cogvideox, (1, 3, 5, 28, 16), (1, 4, 2, 7, 4)),
    "mochi": Case(_mochi, (1, 3, 7, 56, 16), (1, 4, 2, 7, 2)),
    "dc": Case(lambda: _dc("pixel_unshuffle", "pixel_shuffle"), (1, 3, 28, 24), (1, 4, 7, 6)),
    "dc-conv": Case(lambda: _dc("conv", "interpolate"), (1, 3, 28, 24), (1, 4, 7, 6)),
    "tiny": Case(_tiny, (1, 3, 28, 24), (1, 4, 7, 6)),
    "refiner": Case(_refiner, (1, 3, 5, 28, 16), (1, 4, 2, 7, 4)),
    "cosmos": Case(_cosmos, (1, 3, 9, 28, 16), (1, 4, 3, 7, 4)),
    "magvit": Case(_magvit, (1, 3, 9, 28, 16), (1, 4, 3, 7, 4)),
    "temporal-decoder": Case(_temporal_decoder, (4, 3, 28, 16), (4, 4, 7, 4), {"num_frames": 4}),
    "kvae": Case(_kvae, (1, 3, 28, 16), (1, 4, 7, 4)),
    "allegro": Case(_allegro, (1, 3, 8, 52, 16), (1, 4, 2, 13, 4)),
}
