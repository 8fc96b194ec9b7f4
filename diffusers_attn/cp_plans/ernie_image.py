"""ERNIE-Image: image and text are one sequence, in the first dimension. The mask covers all keys."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "ErnieImageTransformer2DModel": {
        "layers.0": {ParamId("x"): CPInput(0, 3, sequence="joint")},
        "layers.*": {
            ParamId("rotary_pos_emb"): CPInput(1, 4, sequence="joint"),
            # Shifts, scales and gates, repeated for every token.
            ParamId("temb"): CPInput(0, 3, sequence="joint"),
        },
        "layers.*.self_attention": CPAttention(("joint",), key_mask=True),
        "final_linear": CPOutput(0, 3, sequence="joint"),
    },
}
