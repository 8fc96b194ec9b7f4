"""Bria and Bria Fibo: Flux's blocks, split like Flux.

Fibo adds a layer of the text encoder to the text of every block, and has a mask of padded text, the same for all
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
            # Reaches attention only under gradient checkpointing.
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
