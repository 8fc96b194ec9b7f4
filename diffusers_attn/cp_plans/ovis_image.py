"""Ovis-Image: Flux's blocks, split like Flux."""

from .flux import BLOCKS, INPUTS, MASK
from .plan import ParamId, Plan

PLANS: dict[str, Plan] = {
    "OvisImageTransformer2DModel": {
        "": {**INPUTS, ParamId("joint_attention_kwargs"): {"attention_mask": MASK}},
        **BLOCKS,
    },
}
