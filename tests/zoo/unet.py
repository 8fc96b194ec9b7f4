"""UNets: self- and cross-attention at several resolutions between convolutions."""

from __future__ import annotations

from .case import BATCH, FRAMES, GRID, TEXT, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]  # the grid is what is left at the lower resolution

SMALL: Config = {
    "in_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4),  # in spite of the name, the number of heads
}

_SDXL: Config = SMALL | {
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}


def unet_inputs(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
    }


@case("sdxl", "UNet2DConditionModel", notes="no mask", **_SDXL)
def sdxl(draw: Draw) -> Inputs:
    added = {"text_embeds": draw.normal(BATCH, 24), "time_ids": draw.rows(80, 112, 0, 8, 80, 112)}
    return unet_inputs(draw) | {"added_cond_kwargs": added}


@case("sdxl_masked", "UNet2DConditionModel", notes="additive mask in cross-attention", **_SDXL)
def sdxl_masked(draw: Draw) -> Inputs:
    return sdxl(draw) | {"encoder_attention_mask": draw.mask()}


@case(
    "sd15",
    "UNet2DConditionModel",
    notes="attention at every resolution, projections by convolution",
    **SMALL,
    out_channels=4,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
def sd15(draw: Draw) -> Inputs:
    return unet_inputs(draw)


@case(
    "unet_added_kv",
    "UNet2DConditionModel",
    notes="as Kandinsky 2.2: one attention whose keys are [text, image], by another processor class; additive mask",
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=8,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    resnet_time_scale_shift="scale_shift",
)
def unet_added_kv(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {"encoder_attention_mask": draw.mask()}


@case(
    "unet_2d",
    "UNet2DModel",
    notes="self-attention that takes images, not tokens; no mask",
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
def unet_2d(draw: Draw) -> Inputs:
    inputs = unet_inputs(draw)
    del inputs["encoder_hidden_states"]
    return inputs


_VIDEO_UNET: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}


@case(
    "unet_3d",
    "UNet3DConditionModel",
    notes="attention within frames, to the text, and over the frames of every pixel",
    **_VIDEO_UNET,
    attention_head_dim=8,
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
)
def unet_3d(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {"sample": draw.normal(BATCH, 4, FRAMES, 2, WIDTH)}


@case(
    "unet_motion",
    "UNetMotionModel",
    notes="as unet_3d; the frames have a text each",
    **_VIDEO_UNET,
    num_attention_heads=2,
    motion_num_attention_heads=2,
    down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
    up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
)
def unet_motion(draw: Draw) -> Inputs:
    return unet_3d(draw) | {"encoder_hidden_states": draw.normal(BATCH * FRAMES, TEXT, 32)}


@case(
    "svd",
    "UNetSpatioTemporalConditionModel",
    notes="as unet_3d; a learned factor mixes what spatial and temporal blocks return",
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),  # the class has no setting for its norms, which are by groups of 32
    layers_per_block=1,
    cross_attention_dim=32,
    num_attention_heads=(2, 4),
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
    down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
    up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
)
def svd(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {
        "sample": draw.normal(BATCH, FRAMES, 4, 2, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, 7, 32),
        "added_time_ids": draw.rows(6, 127, 0.5),
    }
