"""ControlNets of transformers."""

import torch

from diffusers_attn.tiny_models.case import BATCH, IMAGE_TOKENS

from .shipped import two_words

MODELS = dict.fromkeys(
    [
        "flux_controlnet",
        "flux_controlnet, a union and two words",
        "sd3_controlnet",
        "sd3_controlnet, the image alone",
        "qwenimage_controlnet",
        "hunyuan_dit_controlnet",
        "sana_controlnet",
    ]
)


def union(inputs, draw):
    """One of several kinds of conditions, for which a token is put before the text."""
    two_words(inputs, draw)
    inputs["controlnet_mode"] = torch.tensor([[1], [0]], device=draw.device)


def tokens_alone(inputs, draw):
    """As for Stable Diffusion 3.5, whose image is embedded before the call."""
    inputs["hidden_states"] = draw.normal(BATCH, IMAGE_TOKENS, 64)
    del inputs["encoder_hidden_states"]


VARIANTS = {
    "flux_controlnet, a union and two words": ({"num_mode": 2}, union),
    "sd3_controlnet, the image alone": ({"joint_attention_dim": None, "use_pos_embed": False}, tokens_alone),
}
