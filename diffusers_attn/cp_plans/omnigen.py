"""OmniGen: text, input images, time and image are one sequence.

The mask has a row for each query; each rank takes its queries' rows.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "OmniGenTransformer2DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="packed")},
        "layers.*": {
            ParamId("attention_mask"): CPInput(2, 4, sequence="packed"),
            # cos and sin, the same for all samples.
            ParamId("image_rotary_emb"): CPInput(0, 2, sequence="packed"),
        },
        "layers.*.self_attn": CPAttention(("packed",), row_mask=True),
        "norm": CPOutput(1, 3, sequence="packed"),
    },
}
