"""The classes that diffusers itself ships a plan for, CogVideoX and CogView4."""

from diffusers_attn.cp_plans.plan import CPInput, CPOutput, ParamId
from diffusers_attn.tiny_models.case import VIDEO_TOKENS

# The plan of the specification's example, with Wan's rope as it is now: it splits the text too, and names no sequences.
WAN_EXAMPLE = {
    "rope": {ParamId(index=0): CPInput(1, 4, split_output=True), ParamId(index=1): CPInput(1, 4, split_output=True)},
    "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},
    "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
    "proj_out": [CPOutput(1, 3)],
}
# What is before the comma names a case of the zoo, and the whole, in VARIANTS below, what is changed about it.
MODELS = {
    "flux": None,
    "flux, two words": None,
    "wan": None,
    "wan_i2v": None,
    "wan, one time": None,
    "cogvideox": None,
    "cogview4": None,
    "wan, example": WAN_EXAMPLE,
    "chronoedit": None,
    "chronoedit, image and times": None,
    "flux2": None,
    "flux2, flat ids": None,
    "helios": None,
    "helios_amplified": None,
    "helios, without history": None,
    "helios, one time and text for all": None,
    "ltx": None,
    "ltx, times": None,
    "ltx2": None,
    "ltx2, times": None,
    "ltx2, guided": None,
    "ltx2_masked": None,
    "minimax_h3": None,
    "ltx2, two of each": None,
    "qwenimage": None,
    "qwenimage, two words": None,
    "qwenimage, edit with control": None,
}


def two_words(inputs, draw):
    """Fewer tokens than there are ranks."""
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :2]
    if "txt_ids" in inputs:
        inputs["txt_ids"] = inputs["txt_ids"][:2]
    if "encoder_hidden_states_mask" in inputs:
        inputs["encoder_hidden_states_mask"] = draw.mask((1, 2), 2)


def two_of_each(inputs, draw):
    audio_times(inputs, draw)
    for name in ("hidden_states", "timestep", "audio_hidden_states", "audio_timestep"):
        inputs[name] = inputs[name][:, -2:]
    inputs |= {"num_frames": 1, "height": 1, "width": 2, "audio_num_frames": 2}


def times(inputs, draw):
    """One for every token, as where some frames are given."""
    inputs["timestep"] = draw.steps()[:, None] * (1 - draw.mask((35, 100), VIDEO_TOKENS).to(draw.dtype))


def one_time(inputs, draw):
    """Of the form of one for every token."""
    inputs["timestep"] = draw.steps()[:, None]


def image_and_times(inputs, draw):
    times(inputs, draw)
    inputs["hidden_states"] = draw.normal(2, 12, *inputs["hidden_states"].shape[2:])
    inputs["encoder_hidden_states"] = draw.normal(2, 512, 32)
    inputs["encoder_hidden_states_image"] = draw.normal(2, 17, 24)


def flat_ids(inputs, draw):
    for name in ("img_ids", "txt_ids"):
        inputs[name] = inputs[name][0]


def without_history(inputs, draw):
    for name in [name for name in inputs if "history" in name]:
        del inputs[name]


def audio_times(inputs, draw):
    times(inputs, draw)
    inputs["audio_timestep"] = draw.steps()[:, None] * (1 - draw.mask((3, 9), 23).to(draw.dtype))


def guided(inputs, draw):
    """LTX 2 with all that later versions of it have."""
    audio_times(inputs, draw)
    inputs |= {
        "sigma": draw.steps(),
        "audio_sigma": draw.steps() / 2,
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": draw.floats(1, 0),
        "video_keyframes_mask": draw.mask((35, 100), VIDEO_TOKENS)[..., None].to(draw.dtype),
    }


def edit_with_control(inputs, draw):
    """A picture of 5 by 5 tokens beside one of 5 by 2 that is given."""
    inputs["img_shapes"] = [[(1, 5, 5), (1, 5, 2)]] * 2
    inputs["controlnet_block_samples"] = [draw.normal(2, 35, 64), draw.normal(2, 35, 64)]
    del inputs["encoder_hidden_states_mask"]


# Changes to a case's configuration and to its inputs.
VARIANTS = {
    "flux, two words": ({}, two_words),
    "qwenimage, two words": ({}, two_words),
    "ltx2, two of each": ({"rope_type": "split"}, two_of_each),
    "wan, one time": ({}, one_time),
    "chronoedit, image and times": ({"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 64}, image_and_times),
    "flux2, flat ids": ({}, flat_ids),
    "helios, without history": ({}, without_history),
    "helios, one time and text for all": ({"zero_history_timestep": False, "guidance_cross_attn": False}, None),
    "ltx, times": ({}, times),
    "ltx2, times": ({}, audio_times),
    "ltx2, guided": (
        {
            "perturbed_attn": True,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "use_keyframes_abs_pos_embedding": True,
        },
        guided,
    ),
    "qwenimage, edit with control": ({"zero_cond_t": True, "use_layer3d_rope": True}, edit_with_control),
}
