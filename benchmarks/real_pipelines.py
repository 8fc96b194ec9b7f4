"""diffusers' pipelines with transformers and VAEs in real configurations, random weights, and no text encoders.

`PIPELINES[name](device, tiny)` returns a pipeline and the keyword arguments of a call, without the number of steps.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from real_shapes import REAL, TINY, randomize

Made = tuple[Any, dict[str, Any]]

ABSENT: Any = None
"""of a pipeline's component. diffusers' signatures have no None."""

FLUX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def _flux(device: torch.device, tiny: bool) -> Made:
    """FluxPipeline at 1024 x 1024."""
    real = (TINY if tiny else REAL)["flux"]
    smaller = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1} if tiny else {}
    with torch.device(device):
        vae = diffusers.AutoencoderKL(**(FLUX_VAE | smaller)).to(real.dtype)
    randomize(vae, device)
    pipe = diffusers.FluxPipeline(
        transformer=real.make(device),
        vae=vae.eval().requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=ABSENT, tokenizer=ABSENT, text_encoder_2=ABSENT, tokenizer_2=ABSENT,
    )  # fmt: skip
    config, size = pipe.transformer.config, 64 if tiny else 1024
    embeds = {
        "prompt_embeds": _drawn(pipe, device, 1, 1, 32 if tiny else 512, config.joint_attention_dim),
        "pooled_prompt_embeds": _drawn(pipe, device, 2, 1, config.pooled_projection_dim),
    }
    return pipe, {**embeds, "height": size, "width": size}


def _wan(device: torch.device, tiny: bool) -> Made:
    """WanPipeline at 832 x 480 and 81 frames, with guidance 5: two calls of the transformer per step."""
    real = (TINY if tiny else REAL)["wan"]
    with torch.device(device):
        vae = diffusers.AutoencoderKLWan(**({"base_dim": 8, "num_res_blocks": 1} if tiny else {})).to(real.dtype)
    randomize(vae, device)
    pipe = diffusers.WanPipeline(
        transformer=real.make(device),
        vae=vae.eval().requires_grad_(False),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        text_encoder=ABSENT, tokenizer=ABSENT,
    )  # fmt: skip
    shape = (1, 32 if tiny else 512, pipe.transformer.config.text_dim)
    embeds = {name: _drawn(pipe, device, seed, *shape) for seed, name in enumerate(("prompt", "negative_prompt"))}
    size = {"height": 64, "width": 96, "num_frames": 5} if tiny else {"height": 480, "width": 832, "num_frames": 81}
    return pipe, {**{f"{name}_embeds": each for name, each in embeds.items()}, **size, "guidance_scale": 5.0}


def _qwen_image(device: torch.device, tiny: bool) -> Made:
    """QwenImagePipeline at 1024 x 1024, with true guidance of 4: two calls of the transformer per step."""
    real = (TINY if tiny else REAL)["qwen-image"]
    with torch.device(device):
        vae = diffusers.AutoencoderKLQwenImage(**({"base_dim": 8, "num_res_blocks": 1} if tiny else {})).to(real.dtype)
    randomize(vae, device)
    pipe = diffusers.QwenImagePipeline(
        transformer=real.make(device),
        vae=vae.eval().requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=ABSENT, tokenizer=ABSENT,
    )  # fmt: skip
    width, call = pipe.transformer.config.joint_attention_dim, {}
    for seed, (name, length) in enumerate({"prompt": 128, "negative_prompt": 16}.items()):
        call[f"{name}_embeds"] = _drawn(pipe, device, seed, 1, length, width)
        call[f"{name}_embeds_mask"] = torch.ones(1, length, dtype=torch.int64, device=device)
    size = 64 if tiny else 1024
    return pipe, {**call, "height": size, "width": size, "true_cfg_scale": 4.0}


def _drawn(pipe: Any, device: torch.device, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, pipe.transformer.dtype)


PIPELINES = {"flux": _flux, "wan": _wan, "qwen-image": _qwen_image}
