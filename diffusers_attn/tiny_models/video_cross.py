"""Video transformers with self-attention over the video and cross-attention to the text."""

from __future__ import annotations

import torch

from .case import BATCH, FRAMES, GRID, TEXT, VIDEO_TOKENS, Config, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]

_LTX: Config = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": 32,
}


@case("ltx", "LTXVideoTransformer3DModel", notes="additive [batch, heads, 1, text] mask in cross-attention", **_LTX)
def ltx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, VIDEO_TOKENS, 8),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
        "num_frames": FRAMES,
        "height": GRID[0],
        "width": GRID[1],
    }


_LTX2: Config = _LTX | {
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
}
_AUDIO = 23


@case(
    "ltx2",
    "LTX2VideoTransformer3DModel",
    notes="six attentions in a block: video and audio, each to itself, to its text, and to the other",
    **_LTX2,
)
def ltx2(draw: Draw) -> Inputs:
    return ltx(draw) | {
        "audio_hidden_states": draw.normal(BATCH, _AUDIO, 8),
        "audio_encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "audio_encoder_attention_mask": draw.mask((7, 12)),
        "audio_num_frames": _AUDIO,
    }


@case(
    "ltx2_masked",
    "LTX2VideoTransformer3DModel",
    notes="as ltx2, with a mask in the video's self-attention, gated attention, and the other form of rotary embedding",
    **_LTX2,
    gated_attn=True,
    audio_gated_attn=True,
    rope_type="split",
)
def ltx2_masked(draw: Draw) -> Inputs:
    # The first frame, kept as a reference, does not see the others.
    mask = torch.ones(BATCH, VIDEO_TOKENS, VIDEO_TOKENS)
    frame = GRID[0] * GRID[1]
    mask[:, :frame, frame:] = 0
    return ltx2(draw) | {"video_self_attention_mask": mask.to(draw.device, draw.dtype)}


_COSMOS: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 8,
    "max_size": (8, 16, 16),
    "concat_padding_mask": False,  # resizing that mask takes torchvision
}


@case("cosmos", "CosmosTransformer3DModel", notes="boolean key mask in cross-attention", **_COSMOS)
def cosmos(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "attention_mask": draw.mask(),
        "fps": 24,
    }


@case(
    "cosmos2_5",
    "CosmosTransformer3DModel",
    notes="another attention class: cross-attention to the text and to an image in two calls",
    **_COSMOS,
    extra_pos_embed_type=None,
    img_context_dim_in=24,
    img_context_num_tokens=7,
    img_context_dim_out=64,
)
def cosmos2_5(draw: Draw) -> Inputs:
    inputs = cosmos(draw)
    # This processor wants a pair of masks where the model's forward wants one tensor: masks cannot be used.
    inputs["attention_mask"] = None
    return inputs | {"encoder_hidden_states": (inputs["encoder_hidden_states"], draw.normal(BATCH, 7, 24))}


@case(
    "allegro",
    "AllegroTransformer3DModel",
    notes="additive masks in both attentions; rotary embedding passed in by the caller",
    num_attention_heads=4,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    cross_attention_dim=96,
    sample_height=HEIGHT,
    sample_width=WIDTH,
    sample_frames=FRAMES,
    caption_channels=32,
)
def allegro(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
    }


@case(
    "latte",
    "LatteTransformer3DModel",
    notes="blocks over the tokens of a frame alternate with blocks over the frames of a token; no mask",
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=64,
    sample_size=16,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=32,
    video_length=FRAMES,
)
def latte(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, HEIGHT, WIDTH),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
    }


@case(
    "sana_video",
    "SanaVideoTransformer3DModel",
    notes="self-attention is linear: it never calls softmax attention; additive mask in cross-attention",
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=32,
    sample_size=16,
    rope_max_seq_len=32,
)
def sana_video(draw: Draw) -> Inputs:
    return latte(draw) | {"encoder_attention_mask": draw.mask()}


_KANDINSKY: Config = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 32,
    "in_text_dim2": 24,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}


@case(
    "kandinsky5",
    "Kandinsky5Transformer3DModel",
    notes="self-attention over the text, then self-attention over the video and cross-attention; no mask",
    **_KANDINSKY,
)
def kandinsky5(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, FRAMES, HEIGHT, WIDTH, 4),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.steps(),
        "pooled_projections": draw.normal(BATCH, 24),
        "visual_rope_pos": [torch.arange(size, device=draw.device) for size in (FRAMES, *GRID)],
        "text_rope_pos": torch.arange(TEXT, device=draw.device),
    }


@case(
    "kandinsky6",
    "Kandinsky6Transformer3DModel",
    notes="video and audio, each to itself, to its text, and to the other; boolean key mask",
    **_KANDINSKY,
    visual_cond=False,
    in_audio_dim=8,
    out_audio_dim=8,
    ca_rope=True,
    cross_gates=True,
    fix_modulation=True,
)
def kandinsky6(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, FRAMES, HEIGHT, WIDTH, 4),
        "audio_hidden_states": draw.normal(BATCH, _AUDIO, 8),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.steps(),
        "pooled_projections": draw.normal(BATCH, 24),
    }


@case(
    "sana_wm_refiner",
    "SanaWMLTX2RefinerTransformer3DModel",
    notes="the video half of ltx2, with another processor class for self-attention",
    silent={
        "transformer_blocks.*.audio_*": "inherited from ltx2 and never run",
        "transformer_blocks.*.video_to_audio_attn": "inherited from ltx2 and never run",
    },
    **_LTX2,
)
def sana_wm_refiner(draw: Draw) -> Inputs:
    rotation = draw.rotation(VIDEO_TOKENS, 64)
    return {
        "hidden_states": draw.normal(BATCH, VIDEO_TOKENS, 8),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.steps()[:, None].repeat(1, VIDEO_TOKENS),
        "video_rotary_emb": tuple(part.repeat(BATCH, 1, 1) for part in rotation),
    }


@case(
    "temporal",
    "TransformerTemporalModel",
    notes="attention over the frames of every pixel; no mask",
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=8,
    num_layers=2,
    norm_num_groups=4,
)
def temporal(draw: Draw) -> Inputs:
    return {"hidden_states": draw.normal(BATCH * FRAMES, 8, *GRID), "num_frames": FRAMES}


@case(
    "kandinsky6_sr",
    "Kandinsky6SRTransformer3DModel",
    notes="block-sparse attention: a BlockMask for flex attention, which on a CPU cannot record gradients",
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=32,
    model_dim=64,
    ff_dim=64,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
    nabla_window=(1, 1, 1),
    nabla_threshold=0.5,
)
def kandinsky6_sr(draw: Draw) -> Inputs:
    # Attention goes by blocks of 8 by 8 tokens, and there must be some to leave out.
    return {"hidden_states": draw.normal(BATCH, 1, 16, 24, 9), "timestep": draw.steps()}


@case(
    "sana_wm",
    "SanaWMTransformer3DModel",
    notes="self-attention, linear or softmax, is in no processor; boolean key mask in cross-attention",
    in_channels=4,
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    linear_head_dim=16,
    softmax_every_n=2,
    use_chunk_plucker_post_attn=False,
    image_size=64,
    caption_channels=32,
)
def sana_wm(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, FRAMES, *GRID),
        "timestep": draw.steps()[:, None, None].repeat(1, 1, FRAMES),
        "encoder_hidden_states": draw.normal(BATCH, 1, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
    }
