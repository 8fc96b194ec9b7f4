"""OmniGen: text, given images, time and image in one sequence, which is one sequence.

The mask says which keys every query sees: a rank takes the rows of its queries.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "OmniGenTransformer2DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="packed")},
        "layers.*": {
            ParamId("attention_mask"): CPInput(2, 4, sequence="packed"),
            # cos and sin, of one sample for all.
            ParamId("image_rotary_emb"): CPInput(0, 2, sequence="packed"),
        },
        "layers.*.self_attn": CPAttention(("packed",), row_mask=True),
        "norm": CPOutput(1, 3, sequence="packed"),
    },
}
