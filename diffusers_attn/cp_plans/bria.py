"""Bria and Bria Fibo: Flux's blocks. Split as Flux is.

Fibo joins every block's text with a layer of the text encoder, and is given a mask of padded text, alike for all
queries.
"""

from .flux import BEHIND_THE_DOOR, DOOR, MASK
from .plan import CPAbsent, CPInput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "BriaTransformer2DModel": {
        "": {
            **DOOR,
            ParamId("controlnet_block_samples"): CPInput(1, 3, stream="image"),
            ParamId("controlnet_single_block_samples"): CPAbsent(
                "the model takes the image's tokens for text and image, and adds them to what is behind as many as the "
                "text has. Give controlnet_block_samples only."
            ),
            # Reaches attention under gradient checkpointing only.
            ParamId("attention_kwargs"): {"attention_mask": MASK},
        },
        **BEHIND_THE_DOOR,
    },
    "BriaFiboTransformer2DModel": {
        "": {
            **DOOR,
            ParamId("text_encoder_layers"): CPInput(1, 3, stream="text"),
            ParamId("joint_attention_kwargs"): {"attention_mask": MASK},
        },
        **BEHIND_THE_DOOR,
    },
}
