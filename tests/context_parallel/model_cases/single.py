"""Classes with one sequence of all tokens, packed by the model or its caller, or of an image or audio alone."""

from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from diffusers_attn.tiny_models.case import IMAGE_TOKENS, TEXT, VIDEO_TOKENS

MODELS = dict.fromkeys(
    (
        "zimage",
        "zimage, texts of one length",
        "zimage, with control",
        "zimage, reference images",
        "lumina2",
        "lumina2, texts of one length",
        "pixart",
        "pixart_self_mask",
        "stable_audio",
        "stable_audio, without masks",
        "hunyuan_dit",
        "hunyuan_dit, with control",
        "hunyuan_dit, one angle for all tokens",
        "ace_step",
        "omnigen",
        "krea2",
        "krea2, without a mask",
        "qwenimage21",
        "qwenimage21, one time for all",
        "qwenimage21, text alone",
        "qwenimage21, filling a cache",
        "qwenimage21, from a cache",
        "qwenimage21, from a cache without a mask",
        "cosmos3",
        "cosmos3, sound and actions",
        "ideogram4",
        "ideogram4, times",
        "ernie_image",
        "bria_fibo2",
        "bria_fibo2, texts of one length",
        "bria_fibo2, edit",
        "lumina_next",
        "lumina_next, larger than in training",
        "stable_audio3",
        "stable_audio3, without memory",
        "stable_audio3, nothing kept",
        "longcat_audio",
        "longcat_audio, without cross-attention",
        "minimax_music3",
        "dit",
        "transformer_2d",
        "transformer_2d, image mask",
        "transformer_2d, two self-attentions",
        "transformer_2d, cross-attention alone",
        "dreamlite_2d",
        "dreamlite_2d, image mask",
        "dreamlite_2d, without self-attention",
    )
)


def zimage_texts_of_one_length(inputs, draw):
    """So that the model makes no masks."""
    inputs["cap_feats"] = [draw.normal(41, 32) for _ in range(2)]


def zimage_with_control(inputs, draw):
    """Both sequences with their padding: 64 tokens of the image, and of the longer text."""
    inputs["controlnet_block_samples"] = {0: draw.normal(2, 128, 64)}


def zimage_reference_images(inputs, draw):
    """An image that is given and one that is made, in each sample, the latter without anything from SigLIP."""
    image = inputs["x"][0].shape
    inputs["x"] = [[draw.normal(4, 1, 6, 4), draw.normal(*image)] for _ in range(2)]
    inputs["cap_feats"] = [[draw.normal(length, 32) for length in lengths] for lengths in ((41, 7), (5, 7))]
    inputs["siglip_feats"] = [[draw.normal(3, 5, 24), None] for _ in range(2)]
    inputs["image_noise_mask"] = [[0, 1]] * 2


def lumina2_texts_of_one_length(inputs, draw):
    """But for the longer ones' padding, which the model leaves out."""
    inputs["encoder_attention_mask"] = draw.mask((9, 9))


def hunyuan_dit_with_control(inputs, draw):
    inputs["controlnet_block_samples"] = [draw.normal(2, IMAGE_TOKENS, 64)]


def hunyuan_dit_one_angle(inputs, draw):
    inputs["image_rotary_emb"] = draw.rotation(1, 16)


def without_masks(inputs, draw):
    for name in [name for name in inputs if name.endswith("mask") and name != "img_mask"]:
        del inputs[name]


def qwenimage21_text_alone(inputs, draw):
    """No image given, and none to be edited: the target's are the only slots."""
    inputs["hidden_states"] = inputs["hidden_states"][:, 12:]
    inputs["img_shapes"] = [shapes[1:] for shapes in inputs["img_shapes"]]
    inputs["img_mask"][:, 7:10] = False


def qwenimage21_filling_a_cache(inputs, draw):
    inputs |= {"kv_cache": QwenImage21KVCache(2), "kv_cache_mode": "extract"}


def qwenimage21_from_a_cache(inputs, draw):
    """Of 12 words and 12 tokens of the image that is given."""
    qwenimage21_filling_a_cache(inputs, draw)
    inputs["kv_cache_mode"] = "cached"
    for layer in inputs["kv_cache"].layer_caches:
        layer.store(draw.normal(2, 24, 4, 16), draw.normal(2, 24, 4, 16))


def qwenimage21_from_a_cache_without_a_mask(inputs, draw):
    qwenimage21_from_a_cache(inputs, draw)
    without_masks(inputs, draw)


def cosmos3_sound_and_actions(inputs, draw):
    """Of 7 and 5 tokens behind the video, each with a first one that is given."""
    start = TEXT + VIDEO_TOKENS
    inputs["sequence_length"] = start + 12
    indexes = draw.grid(12)[:, 0]
    positions = (start + indexes).repeat(3, 1)
    inputs["position_ids"] = inputs["position_ids"].new_tensor(
        [*zip(*inputs["position_ids"].T.tolist(), *positions.T.tolist())]
    )
    for name, first, count, tokens in (("sound", 0, 7, draw.normal(6, 7)), ("action", 7, 5, draw.normal(5, 3))):
        places = start + first + indexes[:count]
        inputs |= {
            f"{name}_tokens": [tokens],
            f"{name}_token_shapes": [(count, 1, 1)],
            f"{name}_sequence_indexes": places,
            f"{name}_mse_loss_indexes": places[1:],
            f"{name}_timesteps": draw.floats(500).repeat(count - 1),
            f"{name}_noisy_frame_indexes": [indexes[1:count]],
        }
    inputs["action_domain_ids"] = [indexes[1]]


def ideogram4_times(inputs, draw):
    """One for every token."""
    inputs["timestep"] = draw.times()[:, None] * draw.mask((40, 20), 47).to(draw.dtype)


def bria_fibo2_edit(inputs, draw):
    """With two images, of which one is smaller."""
    inputs["context_latents"] = [draw.normal(2, 4, 10, 14), draw.normal(2, 4, 4, 6)]


def larger_than_in_training(inputs, draw):
    inputs["cross_attention_kwargs"] = {"base_sequence_length": 9}


def nothing_kept(inputs, draw):
    del inputs["local_add_cond"]


def image_mask(inputs, draw):
    inputs["attention_mask"] = draw.mask((31, 23), IMAGE_TOKENS)


def additive_image_mask(inputs, draw):
    """This class takes a mask as it is."""
    image_mask(inputs, draw)
    inputs["attention_mask"] = (~inputs["attention_mask"][:, None]).to(draw.dtype) * -10.0


def no_text(inputs, draw):
    del inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]


def omnigen_mask(inputs, draw):
    """In the model's dtype, by whose least number it is multiplied, which for float64 is beyond float32."""
    inputs["attention_mask"] = inputs["attention_mask"].to(draw.dtype)


VARIANTS = {
    "omnigen": ({}, omnigen_mask),
    "zimage, texts of one length": ({}, zimage_texts_of_one_length),
    "zimage, with control": ({}, zimage_with_control),
    "zimage, reference images": ({"siglip_feat_dim": 24}, zimage_reference_images),
    "lumina2, texts of one length": ({}, lumina2_texts_of_one_length),
    "stable_audio, without masks": ({}, without_masks),
    "hunyuan_dit, with control": ({}, hunyuan_dit_with_control),
    "hunyuan_dit, one angle for all tokens": ({}, hunyuan_dit_one_angle),
    "krea2, without a mask": ({}, without_masks),
    "qwenimage21, one time for all": ({"causal_condition": False}, without_masks),
    "qwenimage21, text alone": ({}, qwenimage21_text_alone),
    "qwenimage21, filling a cache": ({}, qwenimage21_filling_a_cache),
    "qwenimage21, from a cache": ({}, qwenimage21_from_a_cache),
    "qwenimage21, from a cache without a mask": ({}, qwenimage21_from_a_cache_without_a_mask),
    "cosmos3, sound and actions": (
        {"sound_gen": True, "sound_dim": 6, "action_gen": True, "action_dim": 3, "num_embodiment_domains": 4},
        cosmos3_sound_and_actions,
    ),
    "ideogram4, times": ({}, ideogram4_times),
    "bria_fibo2, texts of one length": ({}, without_masks),
    "bria_fibo2, edit": ({}, bria_fibo2_edit),
    "lumina_next, larger than in training": ({}, larger_than_in_training),
    "stable_audio3, without memory": ({"num_memory_tokens": 0, "use_differential_attention": False}, None),
    "stable_audio3, nothing kept": ({}, nothing_kept),
    "longcat_audio, without cross-attention": ({"cross_attn": False}, None),
    "transformer_2d, image mask": ({}, image_mask),
    "transformer_2d, two self-attentions": ({"double_self_attention": True}, no_text),
    "transformer_2d, cross-attention alone": ({"only_cross_attention": True}, None),
    "dreamlite_2d, image mask": ({}, additive_image_mask),
    "dreamlite_2d, without self-attention": ({"use_self_attention": False}, None),
}
