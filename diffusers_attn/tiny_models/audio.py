"""Audio transformers."""

from __future__ import annotations

from .case import BATCH, TEXT, Draw, Inputs, case


@case(
    "longcat_audio",
    "LongCatAudioDiTTransformer",
    notes="[batch, keys] boolean masks in self- and cross-attention, each with its own processor class",
    dit_dim=64,
    dit_depth=2,
    dit_heads=4,
    dit_text_dim=32,
    latent_dim=8,
)
def longcat_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 35, 8),
        "attention_mask": draw.mask((31, 23), 35),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.times(),
        "latent_cond": draw.normal(BATCH, 35, 8),
    }


@case(
    "ace_step",
    "AceStepTransformer1DModel",
    notes="grouped queries (enable_gqa); a sliding window, as a dense additive mask, in every other layer",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    in_channels=24,
    audio_acoustic_hidden_dim=8,
    patch_size=2,
    sliding_window=3,
    encoder_hidden_size=32,
)
def ace_step(draw: Draw) -> Inputs:
    frames = 45  # filled up to 46, which is 23 tokens
    return {
        "hidden_states": draw.normal(BATCH, frames, 8),
        "context_latents": draw.normal(BATCH, frames, 16),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "timestep": draw.times(),
        "timestep_r": draw.times() / 2,
    }


@case(
    "stable_audio",
    "StableAudioDiTModel",
    notes="boolean key masks in both attentions; grouped queries in cross-attention; half of a head is rotated",
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    cross_attention_input_dim=24,
    time_proj_dim=32,
    global_states_input_dim=24,
)
def stable_audio(draw: Draw) -> Inputs:
    frames = 34  # the model puts one global token before them
    return {
        "hidden_states": draw.normal(BATCH, 8, frames),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 24),
        "global_hidden_states": draw.normal(BATCH, 1, 24),
        "rotary_embedding": draw.rotation(frames + 1, 8),
        "attention_mask": draw.mask((31, 23), frames),
        "encoder_attention_mask": draw.mask(),
    }


@case(
    "stable_audio3",
    "StableAudio3DiTModel",
    notes="differential attention, two calls subtracted; the text mask replaces tokens, none reaches attention",
    io_channels=8,
    embed_dim=64,
    depth=2,
    num_heads=4,
    cond_token_dim=32,
    global_cond_dim=24,
    local_add_cond_dim=5,
    timestep_features_dim=32,
    ff_mult=2,
    num_memory_tokens=6,
)
def stable_audio3(draw: Draw) -> Inputs:
    frames = 35
    return {
        "hidden_states": draw.normal(BATCH, 8, frames),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "global_hidden_states": draw.normal(BATCH, 24),
        "local_add_cond": draw.normal(BATCH, 5, frames),
    }


@case(
    "minimax_music3",
    "MiniMaxMusic3Transformer1DModel",
    notes="self-attention only; no mask",
    in_channels=8,
    condition_dim=32,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    ff_inner_dim=64,
    rotary_dim=8,
    fourier_embedding_dim=32,
)
def minimax_music3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 8, 35),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, 35, 32),
    }


@case(
    "minimax_music3_rvq",
    "MiniMaxMusic3RVQDepthDecoder",
    notes="causal attention (is_causal), without a mask",
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    audio_vocab_size=32,
    num_codebooks=7,
)
def minimax_music3_rvq(draw: Draw) -> Inputs:
    return {"inputs_embeds": draw.normal(BATCH, 7, 64)}


@case(
    "t5_film",
    "T5FilmDecoder",
    notes="attention by matrix products and softmax in the processor, without any fused call; float mask",
    input_dims=8,
    targets_length=35,
    d_model=64,
    num_layers=2,
    num_heads=4,
    d_kv=16,
    d_ff=64,
)
def t5_film(draw: Draw) -> Inputs:
    return {
        "encodings_and_masks": [(draw.normal(BATCH, TEXT, 64), draw.mask())],
        "decoder_input_tokens": draw.normal(BATCH, 35, 8),
        "decoder_noise_time": draw.times(),
    }
