"""Pipelines of diffusers with random weights that only tests of training use, beside those of `tests/tiny_pipelines`.

Text encoders have real tokenizers, here of bytes. So `max_sequence_length` has to leave room for the instructions that
some pipelines put before prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .. import tiny_pipelines
from ..tiny_pipelines import (
    _VAE,
    ATTENTION,
    LATENTS,
    TEXT_DIM,
    _bytes,
    _random,
    _t5,
    pieces,
)

TINY_FLUX = Path(__file__).resolve().parents[2] / "examples" / "tiny_flux"
_PADDING = {"padding": "<|endoftext|>", "padding_side": "right"}
_GEMMA = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def _clip(length: int = 77) -> tuple[Any, Any]:
    """Tokenizer and configuration of a CLIP text encoder, whose output is that of the token with the highest id."""
    tokenizer = _bytes(**_PADDING)
    tokenizer.model_max_length = length
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=length, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return tokenizer, config


def _t5_encoder() -> tuple[Any, Any]:
    tokenizer = pieces()
    return tokenizer, transformers.T5EncoderModel(transformers.T5Config(**_t5(len(tokenizer)))).eval()


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: a second self-attention in the first block."""
    tokenizer, config = _clip(16)
    tokenizer_3, encoder_3 = _t5_encoder()
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_3=tokenizer_3,
        text_encoder_3=encoder_3,
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=1.5).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_random(
            diffusers.SD3Transformer2DModel(
                **ATTENTION, sample_size=8, num_layers=2, joint_attention_dim=TEXT_DIM, caption_projection_dim=64,
                pooled_projection_dim=32, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
            )
        ),
    )  # fmt: skip


def chroma() -> diffusers.ChromaPipeline:
    tokenizer, encoder = _t5_encoder()
    return diffusers.ChromaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=diffusers.AutoencoderKL(**_VAE, shift_factor=0.1, scaling_factor=0.4).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=_random(
            diffusers.ChromaTransformer2DModel(
                in_channels=4 * LATENTS, num_layers=1, num_single_layers=1, num_attention_heads=4,
                attention_head_dim=16, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
            )
        ),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    **tiny_pipelines.PIPELINES,
    "sd3": sd3,
    "chroma": chroma,
}


def make(name: str) -> Any:
    """One of `PIPELINES` or "flux", without touching the global generator."""
    if name == "flux":
        return diffusers.FluxPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PIPELINES[name]()
