"""Ideogram 4: text and images, packed by the caller in one sequence, which is one sequence. All is per token.

The mask says which tokens belong together: a rank takes the rows of its queries.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Ideogram4Transformer2DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="packed")},
        "layers.*": {
            ParamId("attention_mask"): CPInput(2, 4, sequence="packed"),
            ParamId("image_rotary_emb"): CPInput(1, 3, sequence="packed"),
            # One per token where the caller gives as many times, one per sample elsewhere.
            ParamId("adaln_input"): CPInput(1, 3, sequence="packed", leave_other_dims=True),
        },
        "layers.*.attention": CPAttention(("packed",), row_mask=True),
        "final_layer": [
            {ParamId("conditioning"): CPInput(1, 3, sequence="packed", leave_other_dims=True)},
            CPOutput(1, 3, sequence="packed"),
        ],
    },
}
