"""Krea 2: text and image are one sequence. The text is fused before, replicated.

The mask covers all keys. The model cuts the image from the sequence by its position.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Krea2Transformer2DModel": {
        "text_fusion.layerwise_blocks.*.attn": CPAttention(query=()),
        "text_fusion.refiner_blocks.*.attn": CPAttention(query=()),
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="joint")},
        # cos and sin.
        "transformer_blocks.*": {ParamId("image_rotary_emb"): CPInput(0, 2, sequence="joint")},
        "transformer_blocks.*.attn": CPAttention(("joint",), key_mask=True),
        "transformer_blocks.-1": CPOutput(1, 3, sequence="joint"),
    },
}
