"""ControlNets: half a model, which returns a tensor for every block of the whole one."""

from __future__ import annotations

from .case import BATCH, IMAGE_TOKENS, Draw, Inputs, case
from .image_cross import HUNYUAN_DIT, hunyuan_dit, sana
from .image_flux import FLUX, flux
from .image_joint import QWEN, qwenimage, sd3
from .unet import HEIGHT, SMALL, WIDTH, unet_inputs, unet_motion


@case("flux_controlnet", "FluxControlNetModel", notes="attention of Flux", **FLUX)
def flux_controlnet(draw: Draw) -> Inputs:
    return flux(draw) | {"controlnet_cond": draw.normal(BATCH, IMAGE_TOKENS, 16), "conditioning_scale": 0.5}


@case(
    "sd_controlnet",
    "ControlNetModel",
    notes="attention of UNet2DConditionModel",
    **SMALL,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    conditioning_embedding_out_channels=(4, 8),
)
def sd_controlnet(draw: Draw) -> Inputs:
    # The condition is an image, here of twice the latents' size.
    return unet_inputs(draw) | {"controlnet_cond": draw.normal(BATCH, 3, 2 * HEIGHT, 2 * WIDTH)}


@case(
    "sd3_controlnet",
    "SD3ControlNetModel",
    notes="attention of SD3",
    sample_size=16,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    joint_attention_dim=32,
    caption_projection_dim=64,
    pooled_projection_dim=24,
    pos_embed_max_size=16,
)
def sd3_controlnet(draw: Draw) -> Inputs:
    return sd3(draw) | {"controlnet_cond": draw.normal(BATCH, 4, HEIGHT, WIDTH), "conditioning_scale": 0.5}


@case(
    "qwenimage_controlnet",
    "QwenImageControlNetModel",
    notes="attention of QwenImage",
    **QWEN,
)
def qwenimage_controlnet(draw: Draw) -> Inputs:
    return qwenimage(draw) | {"controlnet_cond": draw.normal(BATCH, IMAGE_TOKENS, 16), "conditioning_scale": 0.5}


@case(
    "hunyuan_dit_controlnet",
    "HunyuanDiT2DControlNetModel",
    notes="attention of HunyuanDiT",
    **HUNYUAN_DIT,
    transformer_num_layers=4,
)
def hunyuan_dit_controlnet(draw: Draw) -> Inputs:
    return hunyuan_dit(draw) | {"controlnet_cond": draw.normal(BATCH, 4, HEIGHT, WIDTH)}


@case(
    "sana_controlnet",
    "SanaControlNetModel",
    notes="attention of Sana: self-attention is linear",
    in_channels=4,
    num_attention_heads=4,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=8,
    cross_attention_dim=32,
    caption_channels=24,
    sample_size=16,
)
def sana_controlnet(draw: Draw) -> Inputs:
    inputs = sana(draw)
    return inputs | {"controlnet_cond": draw.normal(*inputs["hidden_states"].shape)}


@case(
    "sparse_controlnet",
    "SparseControlNetModel",
    notes="attention of UNetMotionModel",
    in_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=2,
    motion_num_attention_heads=2,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    conditioning_embedding_out_channels=(4, 8),
)
def sparse_controlnet(draw: Draw) -> Inputs:
    inputs = unet_motion(draw)
    return inputs | {
        "controlnet_cond": draw.normal(*inputs["sample"].shape),
        "conditioning_mask": draw.normal(BATCH, 1, *inputs["sample"].shape[2:]),
    }


@case(
    "controlnet_union",
    "ControlNetUnionModel",
    notes="as sd_controlnet; before, conditions are weighed by an nn.MultiheadAttention, outside of processors",
    silent={"transformer_layes.0.attn": "attends over the samples of a batch, whose pooled conditions hardly differ"},
    **SMALL,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    conditioning_embedding_out_channels=(4, 8),
    num_control_type=2,
    num_trans_channel=16,
    num_trans_head=2,
    num_proj_channel=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 24,
)
def controlnet_union(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {
        "controlnet_cond": [draw.normal(BATCH, 3, 2 * HEIGHT, 2 * WIDTH)],
        "control_type": draw.rows(0, 1),
        "control_type_idx": [1],
        "added_cond_kwargs": {"text_embeds": draw.normal(BATCH, 24), "time_ids": draw.rows(80, 112, 0, 8, 80, 112)},
    }


@case(
    "controlnet_xs",
    "UNetControlNetXSModel",
    notes="a UNet and a small one beside it, block by block",
    block_out_channels=(16, 32),
    norm_num_groups=8,
    cross_attention_dim=32,
    num_attention_heads=(2, 4),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ctrl_conditioning_embedding_out_channels=(4, 8),
    ctrl_block_out_channels=(8, 16),
    ctrl_num_attention_heads=2,
    ctrl_max_norm_num_groups=4,
)
def controlnet_xs(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {"controlnet_cond": draw.normal(BATCH, 3, 2 * HEIGHT, 2 * WIDTH)}
