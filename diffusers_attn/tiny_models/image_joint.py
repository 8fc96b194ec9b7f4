"""Image transformers whose text and image tokens share one attention call, from separate sequences."""

from __future__ import annotations

import torch

from .case import BATCH, GRID, IMAGE_TOKENS, TEXT, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]  # of latents that the model cuts into patches of 2 by 2

_SD3: Config = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
}


@case("sd3", "SD3Transformer2DModel", notes="[image, text]; the last block drops the text", **_SD3)
@case(
    "sd3_dual",
    "SD3Transformer2DModel",
    notes="as Stable Diffusion 3.5: a second, image-only attention in some blocks, query and key norms",
    **_SD3,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
def sd3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "pooled_projections": draw.normal(BATCH, 24),
        "timestep": draw.steps(),
    }


_COGVIEW: Config = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_embed_dim": 32,
    "time_embed_dim": 32,
    "condition_dim": 8,
}


@case(
    "cogview3plus",
    "CogView3PlusTransformer2DModel",
    notes="[text, image]; no mask",
    **_COGVIEW,
    pos_embed_max_size=16,
    sample_size=16,
)
def cogview3plus(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "original_size": draw.rows(80, 112),
        "target_size": draw.rows(80, 112),
        "crop_coords": draw.rows(0, 8),
    }


@case(
    "cogview4",
    "CogView4Transformer2DModel",
    notes="text mask made an outer product of 1.0 and 0.0, which attention then adds to the logits",
    **_COGVIEW,
    pos_embed_max_size=16,
    sample_size=16,
)
def cogview4(draw: Draw) -> Inputs:
    return cogview3plus(draw) | {"attention_mask": draw.mask()}


@case(
    "glm_image",
    "GlmImageTransformer2DModel",
    notes="as cogview4, with the tokens of a coarse image added to the image",
    **_COGVIEW,
    prior_vq_quantizer_codebook_size=64,
)
def glm_image(draw: Draw) -> Inputs:
    inputs = cogview4(draw)
    del inputs["original_size"]
    return inputs | {
        "prior_token_id": draw.integers(64, BATCH, IMAGE_TOKENS),
        "prior_token_drop": torch.zeros(BATCH, dtype=torch.bool, device=draw.device),
    }


QWEN: Config = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


@case(
    "qwenimage",
    "QwenImageTransformer2DModel",
    notes="[text, image]; boolean key mask from the padded text",
    **QWEN,
)
def qwenimage(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, IMAGE_TOKENS, 16),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.times(),
        "img_shapes": [[(1, *GRID)]] * BATCH,
    }


@case(
    "nucleus_moe",
    "NucleusMoEImageTransformer2DModel",
    notes="image queries, [image, text] keys; [batch, keys] boolean mask; grouped queries; routed experts",
    **QWEN,
    num_key_value_heads=2,
    dense_moe_strategy="all_moe",
    num_experts=4,
    moe_intermediate_dim=32,
    capacity_factors=4.0,  # every expert takes all tokens; choosing some would turn rounding into other outputs
)
def nucleus_moe(draw: Draw) -> Inputs:
    return qwenimage(draw) | {"img_shapes": [(1, *GRID)] * BATCH}


@case(
    "aura_flow",
    "AuraFlowTransformer2DModel",
    notes="[text, image] in double blocks, then single blocks; no mask",
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    joint_attention_dim=32,
    caption_projection_dim=64,
    pos_embed_max_size=256,
)
def aura_flow(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.times(),
    }


@case(
    "prx",
    "PRXTransformer2DModel",
    notes="image queries, [text, image] keys; boolean key mask",
    in_channels=4,
    patch_size=2,
    context_in_dim=32,
    hidden_size=64,
    num_heads=4,
    depth=2,
    axes_dim=[8, 8],
)
def prx(draw: Draw) -> Inputs:
    return aura_flow(draw) | {"attention_mask": draw.mask()}


@case(
    "hidream",
    "HiDreamImageTransformer2DModel",
    notes="[image, text] in double and single blocks; routed experts; the mask of the image multiplies keys",
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    caption_channels=[32, 24],
    text_emb_dim=24,
    num_routed_experts=2,
    num_activated_experts=2,  # all; choosing one would turn rounding into other outputs
    axes_dims_rope=(4, 6, 6),
    max_resolution=(16, 16),
    llama_layers=[0, 1, 1, 0],
    force_inference_output=True,
)
def hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.normal(BATCH, TEXT, 32),
        "encoder_hidden_states_llama3": draw.normal(2, BATCH, TEXT, 24),
        "pooled_embeds": draw.normal(BATCH, 24),
    }


@case(
    "hunyuan_image",
    "HunyuanImageTransformer2DModel",
    notes="[image, text] with a boolean key mask; a text refiner attends with another processor class",
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=2,
    patch_size=(1, 1),
    text_embed_dim=32,
    text_embed_2_dim=24,
    rope_axes_dim=(8, 8),
)
def hunyuan_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, *GRID),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "encoder_hidden_states_2": draw.normal(BATCH, 7, 24),
        "encoder_attention_mask_2": draw.mask((2, 5), 7),
    }


_JOY: Config = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "text_dim": 32,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


@case("joyimage_edit", "JoyImageEditTransformer3DModel", notes="[image, text]; no mask", **_JOY)
def joyimage_edit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, 1, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
    }


@case(
    "joyimage_edit_plus",
    "JoyImageEditPlusTransformer3DModel",
    notes="boolean key mask: padded text, and patches of one or two images, padded as well",
    **_JOY,
)
def joyimage_edit_plus(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 47, 4, 1, 2, 2),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.steps(),
        "shape_list": [[(1, *GRID), (1, 2, 4)], [(1, *GRID)]],
    }
