"""Transformers over one packed sequence of several modalities, whose layout the caller passes in."""

from __future__ import annotations

import torch

from .case import BATCH, FRAMES, GRID, TEXT, VIDEO_TOKENS, Draw, Inputs, case


@case(
    "minimax_h3",
    "MiniMaxH3Transformer3DModel",
    notes="[text, audio, video]; the text attends to itself first",
    num_attention_heads=4,
    attention_head_dim=16,
    hidden_size=48,
    num_layers=2,
    num_refiner_layers=2,
    ffn_dim=64,
    in_channels=4,
    audio_in_channels=6,
    text_dim=32,
    freq_dim=32,
    time_embed_hidden_dim=48,
    time_embed_dim=32,
    rope_freq_dim=2,
)
def minimax_h3(draw: Draw) -> Inputs:
    audio, video_tag, text_tag, audio_tag = 23, 0, 1, 2
    lengths = (TEXT, audio, VIDEO_TOKENS)
    text_indices, audio_indices, video_indices = torch.arange(sum(lengths), device=draw.device).split(lengths)
    tags = torch.tensor([text_tag] * TEXT + [audio_tag] * audio + [video_tag] * VIDEO_TOKENS).to(draw.device)
    return {
        "hidden_states": draw.normal(BATCH, VIDEO_TOKENS, 16),
        "audio_hidden_states": draw.normal(BATCH, audio, 6),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.floats(0.5, 0.25),  # of the video and text, and of the audio
        "timestep_indices": (tags == audio_tag).long(),
        "token_tags": tags,
        "position_ids": torch.cat([draw.grid(TEXT, 1, 1), draw.grid(audio, 1, 1), draw.grid(FRAMES, *GRID)]).float(),
        "video_indices": video_indices,
        "audio_indices": audio_indices,
        "text_indices": text_indices,
    }


@case(
    "cosmos3",
    "Cosmos3OmniTransformer",
    notes="no batch: causal attention of the text, then attention of the video to text and video; grouped queries",
    silent={"layers.1.self_attn": "nothing reads what the last layer makes of the text, one of its two calls"},
    head_dim=16,
    hidden_size=64,
    intermediate_size=64,
    latent_channel=4,
    latent_patch_size=1,
    patch_latent_dim=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    rope_axes_dim=(4, 2, 2),
    vocab_size=32,
)
def cosmos3(draw: Draw) -> Inputs:
    text, video = torch.arange(TEXT + VIDEO_TOKENS, device=draw.device).split((TEXT, VIDEO_TOKENS))
    return {
        "input_ids": draw.integers(32, TEXT),
        "text_indexes": text,
        "position_ids": torch.cat([text.repeat(3, 1), TEXT + draw.grid(FRAMES, *GRID).T], dim=1),
        "und_len": TEXT,
        "sequence_length": TEXT + VIDEO_TOKENS,
        "vision_tokens": [draw.normal(1, 4, FRAMES, *GRID)],
        "vision_token_shapes": [(FRAMES, *GRID)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": draw.floats(500).repeat(VIDEO_TOKENS),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES, device=draw.device)],
    }
