"""Ideogram 4: text and images, which the caller packs into one sequence. All layers are per token.

The mask marks tokens that belong together; each rank takes its queries' rows.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Ideogram4Transformer2DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="packed")},
        "layers.*": {
            ParamId("attention_mask"): CPInput(2, 4, sequence="packed"),
            ParamId("image_rotary_emb"): CPInput(1, 3, sequence="packed"),
            # One time per token, or one per sample.
            ParamId("adaln_input"): CPInput(1, 3, sequence="packed", leave_other_dims=True),
        },
        "layers.*.attention": CPAttention(("packed",), row_mask=True),
        "final_layer": [
            {ParamId("conditioning"): CPInput(1, 3, sequence="packed", leave_other_dims=True)},
            CPOutput(1, 3, sequence="packed"),
        ],
    },
}
