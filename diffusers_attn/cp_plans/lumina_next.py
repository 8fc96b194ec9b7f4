"""Lumina-Next: self-attention over the image; cross-attention to replicated text with its mask is local.

For images larger than in training, the model scales scores by the logarithm of the number of tokens to the base of that
number in training (`base_sequence_length`, an argument of the pipeline). A rank counts only its own tokens, so it gets
another base.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "LuminaNextDiT2DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
        "layers.*": {
            ParamId("image_rotary_emb"): CPInput(1, 3, sequence="image"),
            ParamId("cross_attention_kwargs"): {"base_sequence_length": advanced.CPLogBase("image")},
        },
        "layers.*.attn1": CPAttention(("image",), key_mask=True),
        "layers.*.attn2": CPAttention(("image",), key=()),
        "norm_out": CPOutput(1, 3, sequence="image"),
    },
}
