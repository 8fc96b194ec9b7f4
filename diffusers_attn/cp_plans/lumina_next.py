"""Lumina-Next: self-attention over the image; cross-attention to text that all ranks have whole, with its mask: local.

For pictures larger than those of its training, the model scales scores by the logarithm of how many tokens there are,
to the base of how many there were (`base_sequence_length`, which the pipeline gives). It counts those of its rank, so
that it is given another base.
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
