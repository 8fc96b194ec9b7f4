"""GLM-Image: CogView4's blocks, with tokens of a coarse image added to the image. Split like CogView4.

A separate forward for each image to edit computes its keys, split like any forward, and stores them. When the image is
generated, these keys come first, and every rank has all of them.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("text", "image")

PLANS: dict[str, Plan] = {
    "GlmImageTransformer2DModel": {
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {
            # cos and sin of the image's tokens.
            ParamId("image_rotary_emb"): CPInput(0, 2, sequence="image"),
            ParamId("attention_mask"): CPInput(1, 2, sequence="text"),
            ParamId("kv_cache"): advanced.CPStore("store", 1, sequence=_JOINED),
        },
        "transformer_blocks.*.attn1": CPAttention(_JOINED, prefix="cache", outer_mask=True),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
