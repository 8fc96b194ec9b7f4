"""Image transformers whose text and image share one attention call, but for those that diffusers ships a plan for; and
Flux with all that it may be given."""

import torch

from diffusers_attn.tiny_models.case import BATCH, GRID, IMAGE_TOKENS, TEXT

from .shipped import two_words

MODELS = dict.fromkeys(
    [
        "flux, control and a mask",
        "sd3",
        "sd3_dual",
        "sd3, two words",
        "sd3_dual, control and a layer skipped",
        "hunyuan_image",
        "hunyuan_image, two words",
        "chroma",
        "chroma_float_mask",
        "chroma, two words and control",
        "hidream",
        "hidream, square",
        "hidream, two words",
        "aura_flow",
        "bria",
        "bria, control",
        "bria_fibo",
        "bria_fibo, a mask of pairs",
        "longcat_image",
        "ovis_image",
        "ovis_image, a mask of pairs",
        "flux3",
        "flux3, two words and two steps at once",
        "flux3, without a reference",
        "cogview3plus",
        "cogview3plus, two words",
        "glm_image",
        "glm_image, two words and no keys kept",
        "nucleus_moe",
        "nucleus_moe, experts choose",
        "nucleus_moe, two words",
        "prx",
        "prx, two words",
        "joyimage_edit",
        "joyimage_edit, three pictures and two words",
        "joyimage_edit_plus",
        "joyimage_edit_plus, two words",
    ]
)


def pairs(draw, text=TEXT):
    """A mask of queries by keys, in which every query sees some keys."""
    tokens = text + IMAGE_TOKENS
    seen = draw.normal(BATCH, 1, tokens, tokens) > 0
    return seen | torch.eye(tokens, dtype=torch.bool, device=draw.device)


def control(inputs, draw):
    """Of one ControlNet layer for all double blocks, and one for every single block."""
    inputs["controlnet_block_samples"] = [draw.normal(BATCH, IMAGE_TOKENS, 64)]
    inputs["controlnet_single_block_samples"] = [draw.normal(BATCH, IMAGE_TOKENS, 64) for _ in range(2)]


def control_and_mask(inputs, draw):
    control(inputs, draw)
    inputs["joint_attention_kwargs"] = {"attention_mask": pairs(draw)}
    inputs["img_ids"] = inputs["img_ids"][None]  # as older code gives them


def control_of_double_blocks(inputs, draw):
    control(inputs, draw)
    del inputs["controlnet_single_block_samples"]


def control_and_skip(inputs, draw):
    """The first layer is skipped, as guidance may."""
    inputs["block_controlnet_hidden_states"] = [draw.normal(BATCH, IMAGE_TOKENS, 64) for _ in range(2)]
    inputs["skip_layers"] = [0]


def a_mask_of_pairs(inputs, draw):
    inputs["joint_attention_kwargs"] = {"attention_mask": pairs(draw)}


def two_words_and_control(inputs, draw):
    two_words(inputs, draw)
    control(inputs, draw)
    inputs["attention_mask"] = torch.cat([draw.mask((1, 2), 2), draw.mask((35, 35), IMAGE_TOKENS)], dim=1)


def two_words_of_one_encoder(inputs, draw):
    two_words(inputs, draw)
    inputs["encoder_attention_mask"] = draw.mask((1, 2), 2)
    del inputs["encoder_hidden_states_2"], inputs["encoder_attention_mask_2"]


def square(inputs, draw):
    inputs["hidden_states"] = draw.normal(BATCH, 4, 10, 10)


def two_words_of_each(inputs, draw):
    inputs["encoder_hidden_states_t5"] = inputs["encoder_hidden_states_t5"][:, :1]
    inputs["encoder_hidden_states_llama3"] = inputs["encoder_hidden_states_llama3"][:, :, :2]


def two_steps(inputs, draw):
    two_words(inputs, draw)
    inputs["image_cond_hidden_states"] = inputs["image_cond_hidden_states"][:, :2]
    inputs["image_cond_ids"] = inputs["image_cond_ids"][:2]
    inputs["target_timestep"] = draw.times() / 2


def without_reference(inputs, draw):
    two_words(inputs, draw)
    del inputs["image_cond_hidden_states"], inputs["image_cond_ids"]


def two_words_with_mask(inputs, draw):
    two_words(inputs, draw)
    inputs["attention_mask"] = draw.mask((1, 2), 2)


def no_keys_kept(inputs, draw):
    """What the pipeline gives where there is no image to edit."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    two_words_with_mask(inputs, draw)
    inputs["kv_caches"] = GlmImageKVCache(num_layers=2)
    inputs["kv_caches"].set_mode("read")


def three_pictures(inputs, draw):
    two_words(inputs, draw)
    inputs["hidden_states"] = draw.normal(BATCH, 3, 4, 1, 2 * GRID[0], 2 * GRID[1])


VARIANTS = {
    "flux, control and a mask": ({}, control_and_mask),
    "sd3, two words": ({}, two_words),
    "sd3_dual, control and a layer skipped": ({}, control_and_skip),
    "hunyuan_image, two words": ({}, two_words_of_one_encoder),
    "chroma, two words and control": ({}, two_words_and_control),
    "hidream, square": ({}, square),
    "hidream, two words": ({}, two_words_of_each),
    "bria, control": ({}, control_of_double_blocks),
    "bria_fibo, a mask of pairs": ({}, a_mask_of_pairs),
    "ovis_image, a mask of pairs": ({}, a_mask_of_pairs),
    "flux3, two words and two steps at once": ({"flow_map": True}, two_steps),
    "flux3, without a reference": ({}, without_reference),
    "cogview3plus, two words": ({}, two_words),
    "glm_image, two words and no keys kept": ({}, no_keys_kept),
    # The second block's alone, and each takes half of the tokens.
    "nucleus_moe, experts choose": ({"capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense"}, None),
    "nucleus_moe, two words": ({}, two_words),
    "prx, two words": ({}, two_words_with_mask),
    "joyimage_edit, three pictures and two words": ({"rope_type": "mrope"}, three_pictures),
    "joyimage_edit_plus, two words": ({}, two_words),
}
