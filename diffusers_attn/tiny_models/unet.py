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

SDXL: Config = SMALL | {
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


@case("sdxl", "UNet2DConditionModel", notes="no mask", **SDXL)
def sdxl(draw: Draw) -> Inputs:
    added = {"text_embeds": draw.normal(BATCH, 24), "time_ids": draw.rows(80, 112, 0, 8, 80, 112)}
    return unet_inputs(draw) | {"added_cond_kwargs": added}


@case("sdxl_masked", "UNet2DConditionModel", notes="additive mask in cross-attention", **SDXL)
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


@case(
    "i2vgen_xl",
    "I2VGenXLUNet",
    notes="as unet_3d; frames of the given image attend to each other before the first block",
    **_VIDEO_UNET,
    attention_head_dim=8,
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
)
def i2vgen_xl(draw: Draw) -> Inputs:
    return unet_3d(draw) | {
        "fps": draw.floats(16.0, 8.0),
        "image_latents": draw.normal(BATCH, 4, FRAMES, 2, WIDTH),
        "image_embeddings": draw.normal(BATCH, 32),
    }


@case(
    "kandinsky3",
    "Kandinsky3UNet",
    notes="additive mask of the text; the text is pooled by attention with the same processor",
    in_channels=4,
    time_embedding_dim=32,
    groups=8,
    attention_head_dim=8,
    layers_per_block=2,
    block_out_channels=(16, 32),
    cross_attention_dim=32,
    encoder_hid_dim=24,
)
def kandinsky3(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 24),
        "encoder_attention_mask": draw.mask(),
    }


@case(
    "stable_cascade",
    "StableCascadeUNet",
    notes="one attention whose keys are [pixels, text and image]; no mask",
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=8,
    conditioning_dim=32,
    block_out_channels=(16, 32),
    num_attention_heads=(2, 4),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    clip_text_in_channels=32,
    clip_text_pooled_in_channels=24,
    clip_image_in_channels=24,
    clip_seq=2,
    dropout=(0.0, 0.0),
    self_attn=(True, True),
    switch_level=(True,),
    block_types_per_layer=(
        ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
    ),
)
def stable_cascade(draw: Draw) -> Inputs:
    return {
        "sample": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        # Fed into sines after multiplication by 10000, which bfloat16 rounds: see Draw.steps.
        "timestep_ratio": draw.floats(2**-12, 2**-11),
        "clip_text_pooled": draw.normal(BATCH, 1, 24),
        "clip_text": draw.normal(BATCH, TEXT, 32),
        "clip_img": draw.normal(BATCH, 1, 24),
    }


@case(
    "uvit",
    "UVit2DModel",
    notes="as aMUSEd: discrete pixels; attention of the convolutional blocks and of the transformer between them",
    hidden_size=32,
    cond_embed_dim=24,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    encoder_hidden_size=32,
    vocab_size=33,
    codebook_size=32,
    in_channels=32,
    block_out_channels=32,
    num_res_blocks=1,
    downsample=True,
    upsample=True,
    block_num_heads=2,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)
def uvit(draw: Draw) -> Inputs:
    # The model takes its input for square.
    return {
        "input_ids": draw.integers(33, BATCH, 10, 10),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "pooled_text_emb": draw.normal(BATCH, 24),
        "micro_conds": draw.rows(80, 80, 0, 8, 6),
    }


@case(
    "dreamlite",
    "DreamLiteUNetModel",
    notes="grouped heads and query and key norms in blocks of which some have no self-attention",
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=(2, 4),
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
)
def dreamlite(draw: Draw) -> Inputs:
    return unet_inputs(draw) | {"encoder_attention_mask": draw.mask()}
