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
                "in the single blocks the model adds them to the wrong tokens: it skips the text's length in a tensor "
                "that has only the image's tokens. Give controlnet_block_samples only."
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
