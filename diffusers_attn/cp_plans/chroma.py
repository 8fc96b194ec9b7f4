"""Chroma: Flux's blocks, with a mask that every block makes of one value per token of text and image."""

from .flux import INPUTS, JOINED
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "ChromaTransformer2DModel": {
        "": {
            **INPUTS,
            ParamId("attention_mask"): CPInput(1, 2, sequence=JOINED),
            ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="image"),
            ParamId("controlnet_single_block_samples"): CPInput(1, 3, sequence="image"),
        },
        "transformer_blocks.*.attn": CPAttention(JOINED, outer_mask=True),
        "single_transformer_blocks.*.attn": CPAttention(JOINED, outer_mask=True),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
