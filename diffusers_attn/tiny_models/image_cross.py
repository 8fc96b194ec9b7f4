"""Image transformers with self-attention over the image and cross-attention to the text."""

from __future__ import annotations

import torch

from .case import BATCH, GRID, IMAGE_TOKENS, TEXT, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]

_PIXART: Config = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": 16,
    "patch_size": 2,
    "use_additional_conditions": False,
    "caption_channels": 24,
}


@case("pixart", "PixArtTransformer2DModel", notes="additive mask in cross-attention", **_PIXART)
def pixart(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 24),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
        # The class insists on this dictionary even when it has no use for it.
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@case("pixart_self_mask", "PixArtTransformer2DModel", notes="additive masks in both attentions", **_PIXART)
def pixart_self_mask(draw: Draw) -> Inputs:
    return pixart(draw) | {"attention_mask": draw.mask((31, 23), IMAGE_TOKENS)}


_SANA: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 16,
    "patch_size": 1,
}


@case(
    "sana",
    "SanaTransformer2DModel",
    notes="self-attention is linear: it never calls softmax attention; additive mask in cross-attention",
    **_SANA,
)
def sana(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, *GRID),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 24),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
    }


@case(
    "sana_sprint",
    "SanaTransformer2DModel",
    notes="as sana, with guidance and with query and key norms",
    **_SANA,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
)
def sana_sprint(draw: Draw) -> Inputs:
    return sana(draw) | {"guidance": draw.guidance()}


@case(
    "dit",
    "DiTTransformer2DModel",
    notes="self-attention only; classes instead of texts",
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=16,
    patch_size=2,
    num_embeds_ada_norm=8,
)
def dit(draw: Draw) -> Inputs:
    # The model takes its input for square.
    return {
        "hidden_states": draw.normal(BATCH, 4, 10, 10),
        "timestep": draw.steps(),
        "class_labels": draw.integers(8, BATCH),
    }


HUNYUAN_DIT: Config = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 16,
    "hidden_size": 64,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 64,
    "pooled_projection_dim": 24,
    "text_len": TEXT,
    "text_len_t5": 7,
}


@case(
    "hunyuan_dit",
    "HunyuanDiT2DModel",
    notes="the text mask replaces tokens, none reaches attention; a pooling of the text attends outside processors",
    **HUNYUAN_DIT,
    num_layers=4,
)
def hunyuan_dit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "text_embedding_mask": draw.mask(),
        "encoder_hidden_states_t5": draw.normal(BATCH, 7, 64),
        "text_embedding_mask_t5": draw.mask((2, 5), 7),
        "image_meta_size": draw.rows(80, 112, 80, 112, 0, 8),
        "style": torch.zeros(BATCH, dtype=torch.long, device=draw.device),
        "image_rotary_emb": draw.rotation(IMAGE_TOKENS, 16),
    }


@case(
    "lumina_next",
    "LuminaNextDiT2DModel",
    notes="boolean masks expanded to [batch, heads, queries, keys]; grouped queries; gated cross-attention",
    sample_size=16,
    patch_size=2,
    in_channels=4,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=8,
    learn_sigma=False,
    cross_attention_dim=32,
)
def lumina_next(draw: Draw) -> Inputs:
    # Complex rotations for the positions of a larger grid, from which the model cuts what it needs.
    angles = draw.normal(16, 16, 8).float()
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_mask": draw.mask(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


_TRANSFORMER_2D: Config = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 8,
    "num_layers": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
}


@case("transformer_2d", "Transformer2DModel", notes="additive mask in cross-attention", **_TRANSFORMER_2D)
@case(
    "dreamlite_2d",
    "DreamLiteTransformer2DModel",
    notes="query and key norms; the mask goes to attention as it is, without being made additive",
    **_TRANSFORMER_2D,
    qk_norm="rms_norm",
)
def transformer_2d(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 8, *GRID),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
    }
