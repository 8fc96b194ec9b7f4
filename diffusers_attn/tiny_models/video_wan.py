"""Wan and its descendants: self-attention over the video, cross-attention to the text and to images."""

from __future__ import annotations

import torch

from .case import BATCH, FRAMES, GRID, TEXT, VIDEO_TOKENS, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]

_BLOCKS: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
_WAN: Config = _BLOCKS | {"rope_max_seq_len": 32}
_HELIOS: Config = _BLOCKS | {"in_channels": 4, "rope_dim": (4, 6, 6)}


@case("wan", "WanTransformer3DModel", notes="self- and cross-attention of one processor class", **_WAN, in_channels=4)
def wan(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
    }


@case(
    "wan_i2v",
    "WanTransformer3DModel",
    notes="cross-attention attends to the text and to an image in two calls, and adds the results",
    **_WAN,
    in_channels=12,
    image_dim=24,
    added_kv_proj_dim=64,
)
def wan_i2v(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 12, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        # The processor takes the last 512 tokens for the text, whatever was passed.
        "encoder_hidden_states": draw.normal(BATCH, 512, 32),
        "encoder_hidden_states_image": draw.normal(BATCH, 17, 24),
    }


@case("chronoedit", "ChronoEditTransformer3DModel", notes="as wan, from a copied processor", **_WAN, in_channels=4)
def chronoedit(draw: Draw) -> Inputs:
    return wan(draw)


@case(
    "wan_vace",
    "WanVACETransformer3DModel",
    notes="further blocks of the same attention for a control video",
    **_WAN,
    in_channels=4,
    vace_layers=[0, 1],
    vace_in_channels=6,
)
def wan_vace(draw: Draw) -> Inputs:
    return wan(draw) | {
        "control_hidden_states": draw.normal(BATCH, 6, FRAMES, HEIGHT, WIDTH),
    }


@case("skyreels_v2", "SkyReelsV2Transformer3DModel", notes="as wan, from a copied processor", **_WAN, in_channels=4)
def skyreels_v2(draw: Draw) -> Inputs:
    return wan(draw)


@case(
    "skyreels_v2_causal",
    "SkyReelsV2Transformer3DModel",
    notes="boolean [1, 1, tokens, tokens] mask, causal by blocks of frames; a timestep for every frame",
    **_WAN,
    in_channels=4,
    num_frame_per_block=5,
)
def skyreels_v2_causal(draw: Draw) -> Inputs:
    # As many tokens as in the other cases, in more and smaller frames.
    frames = FRAMES * GRID[0]
    return wan(draw) | {
        "hidden_states": draw.normal(BATCH, 4, frames, 2, WIDTH),
        "timestep": draw.steps()[:, None] + 4 * torch.arange(frames, device=draw.device),
        "enable_diffusion_forcing": True,
    }


@case(
    "anyflow",
    "AnyFlowTransformer3DModel",
    notes="as wan, with separate processor classes for self- and cross-attention",
    **_WAN,
    in_channels=4,
)
def anyflow(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, FRAMES, 4, HEIGHT, WIDTH),
        "timestep": draw.steps()[:, None].repeat(1, FRAMES),
        "r_timestep": draw.steps()[:, None].repeat(1, FRAMES) / 2,
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
    }


@case(
    "anyflow_far",
    "AnyFlowFARTransformer3DModel",
    notes="as anyflow, in chunks of frames that see earlier ones: block mask, padded to 128 tokens, in self-attention",
    **_WAN,
    in_channels=4,
    chunk_partition=(1, 2, 2),
)
def anyflow_far(draw: Draw) -> Inputs:
    return anyflow(draw) | {"chunk_partition": (1, 2, 2)}


@case(
    "helios",
    "HeliosTransformer3DModel",
    notes="self-attention over [history, video], cross-attention of the video only",
    **_HELIOS,
)
@case(
    "helios_amplified",
    "HeliosTransformer3DModel",
    notes="as helios; the processor scales the keys of the history",
    only_float32="the scale stays in float32 and makes the keys float32, next to queries of the lower precision",
    **_HELIOS,
    is_amplify_history=True,
)
def helios(draw: Draw) -> Inputs:
    def frames(count: int) -> torch.Tensor:
        return draw.normal(BATCH, 4, count, HEIGHT, WIDTH)

    def positions(start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=draw.device).repeat(BATCH, 1)

    return wan(draw) | {
        "indices_hidden_states": positions(7, 12),
        "latents_history_short": frames(1),
        "indices_latents_history_short": positions(6, 7),
        "latents_history_mid": frames(2),
        "indices_latents_history_mid": positions(4, 6),
        "latents_history_long": frames(4),
        "indices_latents_history_long": positions(0, 4),
    }


@case(
    "wan_animate",
    "WanAnimateTransformer3DModel",
    notes="as wan_i2v, with cross-attention to the motion of a face, frame by frame, in every other block",
    **_WAN,
    in_channels=12,
    latent_channels=4,
    image_dim=24,
    added_kv_proj_dim=64,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=1,
)
def wan_animate(draw: Draw) -> Inputs:
    # The reference frame and FRAMES - 1 more, each of which stands for four frames of the face, and one.
    return wan_i2v(draw) | {
        "pose_hidden_states": draw.normal(BATCH, 4, FRAMES - 1, HEIGHT, WIDTH),
        "face_pixel_values": draw.normal(BATCH, 3, 4 * (FRAMES - 1) - 3, 16, 16),
    }


@case(
    "wan_animate2",
    "WanAnimate2Transformer3DModel",
    notes="no batch; two processor classes; fills a cache of keys and values, as before the first step of sampling",
    text_len=TEXT,
    in_dim=8,
    dim=64,
    ffn_dim=64,
    freq_dim=32,
    text_dim=32,
    out_dim=4,
    num_heads=4,
    num_layers=2,
)
def wan_animate2(draw: Draw) -> Inputs:
    # Imported here because diffusers loads its models when they are asked for, and the other cases do not need this.
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [draw.normal(4, FRAMES, HEIGHT, WIDTH)],
        "condition_latents": [draw.normal(4, FRAMES, HEIGHT, WIDTH)],
        "encoder_hidden_states": [draw.normal(TEXT, 32)],
        "encoder_hidden_states_image": draw.normal(1, 7, 1280),  # the width of CLIP, not configurable
        "timestep": draw.floats(250),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": VIDEO_TOKENS,
        "offset_grid_sizes": torch.tensor([[FRAMES, *GRID]]),  # stays on the CPU: the model makes integers of it
    }
