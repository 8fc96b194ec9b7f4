"""Bria and Bria Fibo: Flux's blocks. Split as Flux is.

Fibo joins every block's text with a layer of the text encoder, and is given a mask of padded text, alike for all
queries.
"""

from . import advanced
from .flux import BLOCKS, INPUTS, MASK
from .plan import CPInput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "BriaTransformer2DModel": {
        "": {
            **INPUTS,
            ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="image"),
            ParamId("controlnet_single_block_samples"): advanced.CPForbidden(
                "the model takes the image's tokens for text and image, and adds them to what is behind as many as the "
                "text has. Give controlnet_block_samples only."
            ),
            # Reaches attention under gradient checkpointing only.
            ParamId("attention_kwargs"): {"attention_mask": MASK},
        },
        **BLOCKS,
    },
    "BriaFiboTransformer2DModel": {
        "": {
            **INPUTS,
            ParamId("text_encoder_layers"): CPInput(1, 3, sequence="text"),
            ParamId("joint_attention_kwargs"): {"attention_mask": MASK},
        },
        **BLOCKS,
    },
}
