"""Image transformers that attend over one sequence of text and image tokens."""

from __future__ import annotations

import torch

from .case import BATCH, GRID, IMAGE_TOKENS, TEXT, TEXT_LENGTHS, Draw, Inputs, case

HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]


@case(
    "lumina2",
    "Lumina2Transformer2DModel",
    notes="boolean key masks; two query heads share a key head, which the processor repeats",
    sample_size=16,
    patch_size=2,
    in_channels=4,
    hidden_size=64,
    num_layers=2,
    num_refiner_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=8,
    axes_dim_rope=(4, 6, 6),
    axes_lens=(64, 32, 32),
    cap_feat_dim=32,
)
def lumina2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "encoder_attention_mask": draw.mask(),
    }


@case(
    "zimage",
    "ZImageTransformer2DModel",
    notes="boolean key masks, made by the model because the samples' sequences differ in length",
    in_channels=4,
    dim=64,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=4,
    n_kv_heads=4,
    cap_feat_dim=32,
    axes_dims=[4, 6, 6],
    axes_lens=[256, 32, 32],
)
def zimage(draw: Draw) -> Inputs:
    # The model fills each sequence up to a multiple of 32 tokens and masks only what differs beyond that, so the texts
    # must differ by more than 32. No sequence length that attention sees can be odd.
    return {
        "x": [draw.normal(4, 1, HEIGHT, WIDTH) for _ in range(BATCH)],
        "t": draw.times(),
        "cap_feats": [draw.normal(length, 32) for length in (41, 5)],
    }


@case(
    "ideogram4",
    "Ideogram4Transformer2DModel",
    notes="block-diagonal mask: left padding, and two images packed into the second row",
    in_channels=16,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    intermediate_size=64,
    adaln_dim=16,
    llm_features_dim=32,
    mrope_section=(4, 2, 2),
)
def ideogram4(draw: Draw) -> Inputs:
    # A row is a list of (segment, role, tokens); the roles are diffusers' token indicators for padding, text, image.
    padding, text, image = 0, 3, 2
    rows = (
        [(-1, padding, 1), (1, text, 11), (1, image, 35)],
        [(-1, padding, 3), (1, text, 4), (1, image, 15), (2, text, 5), (2, image, 20)],
    )
    tokens = 47
    segments = torch.tensor([[segment for segment, _, n in row for _ in range(n)] for row in rows])
    roles = torch.tensor([[role for _, role, n in row for _ in range(n)] for row in rows])
    return {
        "hidden_states": draw.normal(BATCH, tokens, 16),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, tokens, 32),
        "position_ids": draw.integers(32, BATCH, tokens, 3),
        "segment_ids": segments.to(draw.device),
        "indicator": roles.to(draw.device),
    }


@case(
    "omnigen",
    "OmniGenTransformer2DModel",
    notes="additive [batch, 1, tokens, tokens] mask: causal text, bidirectional images, left padding",
    in_channels=4,
    patch_size=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,  # the processor cannot do with fewer, though the configuration allows it
    intermediate_size=64,
    num_layers=2,
    pad_token_id=0,
    vocab_size=100,
    rope_scaling={"long_factor": [1.0 + i / 8 for i in range(8)], "short_factor": [1.0] * 8},
    pos_embed_max_size=16,
    time_step_dim=32,
)
def omnigen(draw: Draw) -> Inputs:
    text, lengths = 29, (25, 7)
    total = text + 1 + IMAGE_TOKENS  # a time token stands between the text and the image
    picture = slice(7, 22)  # where the text of the first sample holds an input image of 3 by 5 patches

    visible = torch.ones(total, total).tril()
    visible[text + 1 :] = 1  # the image that is made sees everything
    mask = visible.repeat(BATCH, 1, 1)
    mask[0, picture, picture] = 1
    positions = torch.zeros(BATCH, total, dtype=torch.long)
    for sample, length in enumerate(lengths):
        padding = text - length
        mask[sample, :, :padding] = 0
        mask[sample, :padding] = 1  # a row without any visible key has no softmax; nobody reads these rows
        positions[sample, padding:] = torch.arange(total - padding)
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.times(),
        "input_ids": draw.integers(100, BATCH, text),
        "input_img_latents": [draw.normal(1, 4, 6, 10)],
        "input_image_sizes": {0: [[picture.start, picture.stop]]},
        "attention_mask": mask.to(draw.device),
        "position_ids": positions.to(draw.device),
    }


@case(
    "krea2",
    "Krea2Transformer2DModel",
    notes="boolean key masks; grouped queries; the text encoder's layers are fused by attention first",
    in_channels=16,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_head_dim=16,
    intermediate_size=64,
    timestep_embed_dim=32,
    text_hidden_dim=32,
    num_text_layers=5,
    text_num_attention_heads=4,
    text_num_key_value_heads=2,
    text_intermediate_size=32,
    axes_dims_rope=(4, 6, 6),
)
def krea2(draw: Draw) -> Inputs:
    image_positions = draw.grid(1, *GRID)
    return {
        "hidden_states": draw.normal(BATCH, IMAGE_TOKENS, 16),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 5, 32),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.times(),
        "position_ids": torch.cat([torch.zeros_like(image_positions[:TEXT]), image_positions]).float(),
    }


@case(
    "ernie_image",
    "ErnieImageTransformer2DModel",
    notes="[image, text], sequence first; boolean key mask from the texts' lengths",
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    ffn_hidden_size=64,
    in_channels=4,
    out_channels=4,
    patch_size=1,
    text_in_dim=32,
    rope_axes_dim=(4, 6, 6),
)
def ernie_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, *GRID),
        "timestep": draw.steps(),
        "text_bth": draw.normal(BATCH, TEXT, 32),
        "text_lens": torch.tensor(TEXT_LENGTHS, device=draw.device),
    }


@case(
    "prior",
    "PriorTransformer",
    notes="causal and key mask in one, additive, [batch * heads, tokens, tokens]",
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    embedding_dim=32,
    num_embeddings=TEXT,
    additional_embeddings=4,
)
def prior(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 32),
        "timestep": draw.steps(),
        "proj_embedding": draw.normal(BATCH, 32),
        "encoder_hidden_states": draw.normal(BATCH, TEXT, 32),
        "attention_mask": draw.mask(),
    }


@case(
    "qwenimage21",
    "QwenImage21Transformer2DModel",
    notes="text and reference image causal by segments, one call for each segment; boolean key mask",
    in_channels=16,
    out_channels=16,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    context_in_dim=32,
    mlp_ratio=2,
    axes_dims_rope=(4, 6, 6),
)
def qwenimage21(draw: Draw) -> Inputs:
    # The text holds a slot for every 2 by 2 tokens of an image: three for the reference, 15 for the target at the end.
    reference, target = (1, 2, 6), (1, 6, 10)
    is_image = torch.tensor([False] * 7 + [True] * 3 + [False] * 5 + [True] * 15)
    return {
        "hidden_states": draw.normal(BATCH, 12 + 60, 16),
        "encoder_hidden_states": draw.normal(BATCH, 15, 32),
        "encoder_hidden_states_mask": draw.mask((14, 12), 15),
        "timestep": draw.times(),
        "img_shapes": [[reference, target]] * BATCH,
        "img_mask": is_image.repeat(BATCH, 1).to(draw.device),
    }


@case(
    "bria_fibo2",
    "BriaFibo2Transformer2DModel",
    notes="[image, summary of the text] with a boolean key mask; masked cross-attention to the text in some blocks",
    in_channels=4,
    patch_size=2,
    dim=64,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=4,
    cap_feat_dim=32,
    injection_layer_ids=(1,),
    min_num_gist_tokens=3,
    max_num_gist_tokens=7,
    gist_step=2,
    gist_min_text_len=4,
    gist_max_text_len=12,
    axes_dims=(4, 6, 6),
    axes_lens=(64, 32, 32),
)
def bria_fibo2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(BATCH, 4, HEIGHT, WIDTH),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(BATCH, 2, TEXT, 32),  # one layer to summarise, one for the injection
        "encoder_attention_mask": draw.mask(),
    }
