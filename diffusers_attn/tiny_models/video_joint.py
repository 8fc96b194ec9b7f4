"""Video transformers whose text and video tokens share one attention call."""

from __future__ import annotations

import torch

from .case import BATCH, FRAMES, GRID, TEXT, VIDEO_TOKENS, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]

_COGVIDEO: Config = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": WIDTH,
    "sample_height": HEIGHT,
    "sample_frames": 17,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}


@case(
    "cogvideox",
    "CogVideoXTransformer3DModel",
    notes="[text, video]; rotary embedding passed in by the caller",
    **_COGVIDEO,
)
def cogvideox(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, FRAMES, 4, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "image_rotary_emb": draw.rotation(VIDEO_TOKENS, 16),
    }


@case(
    "mochi",
    "MochiTransformer3DModel",
    notes="[video, text]; every sample attends on its own, without its padding; no mask reaches attention",
    patch_size=2,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    pooled_projection_dim=32,
    in_channels=4,
    text_embed_dim=32,
    time_embed_dim=32,
    max_sequence_length=TEXT,
)
def mochi(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
    }


_HUNYUAN: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 32,
    "pooled_projection_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}


@case(
    "hunyuan_video",
    "HunyuanVideoTransformer3DModel",
    notes="[video, text] with a boolean key mask; a text refiner attends with another processor class",
    **_HUNYUAN,
)
def hunyuan_video(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "pooled_projections": draw.normal(BATCH, 24),
        "guidance": 1000 * draw.guidance(),
    }


@case(
    "hunyuan_video15",
    "HunyuanVideo15Transformer3DModel",
    notes="[video, image, two texts]; the processor makes a boolean outer product, so padding sees no key at all",
    in_channels=8,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_refiner_layers=2,
    patch_size=1,
    patch_size_t=1,
    text_embed_dim=32,
    text_embed_2_dim=24,
    image_embed_dim=20,
    rope_axes_dim=(4, 6, 6),
    target_size=16,
)
def hunyuan_video15(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 8, FRAMES, *GRID),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "encoder_hidden_states_2": draw.normal(BATCH, 7, 24),
        "encoder_attention_mask_2": draw.mask((2, 5), 7),
        "image_embeds": draw.normal(BATCH, 5, 20),  # all zero would mean text-to-video
    }


@case(
    "hunyuan_video_framepack",
    "HunyuanVideoFramepackTransformer3DModel",
    notes="as hunyuan_video, with downsampled history frames before the video and an image before the text",
    **_HUNYUAN,
    has_image_proj=True,
    image_proj_dim=20,
    has_clean_x_embedder=True,
)
def hunyuan_video_framepack(draw: Draw) -> Inputs:
    def frames(count: int) -> torch.Tensor:
        return draw.normal(BATCH, 4, count, HEIGHT, WIDTH)

    def positions(start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=draw.device)

    return hunyuan_video(draw) | {
        "image_embeds": draw.normal(BATCH, 5, 20),
        "indices_latents": positions(7, 12),
        "latents_clean": frames(1),
        "indices_latents_clean": positions(6, 7),
        "latents_history_2x": frames(2),
        "indices_latents_history_2x": positions(4, 6),
        "latents_history_4x": frames(4),
        "indices_latents_history_4x": positions(0, 4),
    }


@case(
    "motif_video",
    "MotifVideoTransformer3DModel",
    notes="[video, text] with a boolean key mask; then the same text once more by cross-attention",
    in_channels=9,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=32,
    image_embed_dim=20,
    rope_axes_dim=(4, 6, 6),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)
def motif_video(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 9, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "image_embeds": draw.normal(BATCH, 5, 20),
    }


@case(
    "easyanimate",
    "EasyAnimateTransformer3DModel",
    notes="[text, video]; no mask",
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    num_layers=2,
    mmdit_layers=1,
    time_embed_dim=32,
    text_embed_dim=32,
)
def easyanimate(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
    }


@case(
    "consisid",
    "ConsisIDTransformer3DModel",
    notes="as cogvideox, with attention to a face every other block, which is in no processor",
    **_COGVIDEO,
    is_train_face=True,
    cross_attn_interval=2,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=20,
    LFE_vit_dim=24,
    LFE_depth=2,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=3,
    LFE_num_querie=5,
    LFE_output_dim=42,  # two thirds of the model's width
    LFE_ff_mult=2,
    LFE_num_scale=2,
)
def consisid(draw: Draw) -> Inputs:
    return cogvideox(draw) | {
        "id_cond": draw.normal(BATCH, 20),
        "id_vit_hidden": [draw.normal(BATCH, 7, 24) for _ in range(2)],
    }
