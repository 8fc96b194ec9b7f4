"""Latte: attention over the pixels of every frame, then over the frames of every pixel.

Pixels are split, so attention over frames is local. There, samples and pixels are one dimension, also in the times that
the model repeats for it. Cross-attention to replicated text is local.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "LatteTransformer3DModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="places")},
        "transformer_blocks.*.attn1": CPAttention(("places",)),
        "transformer_blocks.*.attn2": CPAttention(("places",), key=()),
        "temporal_transformer_blocks.*": {ParamId("timestep"): CPInput(0, 2, sequence="places", flattened=True)},
        "temporal_transformer_blocks.*.attn1": CPAttention(query=()),
        "proj_out": CPOutput(1, 3, sequence="places"),
    },
}
