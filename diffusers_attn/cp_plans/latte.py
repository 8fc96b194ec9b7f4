"""Latte: attention over the places of every frame, then over the frames of every place.

The places are split, so that the second needs no other rank. There samples and places are one dimension, and so they
are of the times that the model repeats for it. Cross-attention is to text that all ranks have whole: local.
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
