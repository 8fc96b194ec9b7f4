"""Ovis-Image: Flux's blocks. Split as Flux is."""

from .flux import BEHIND_THE_DOOR, DOOR, MASK
from .plan import ParamId, Plan

PLANS: dict[str, Plan] = {
    "OvisImageTransformer2DModel": {
        "": {**DOOR, ParamId("joint_attention_kwargs"): {"attention_mask": MASK}},
        **BEHIND_THE_DOOR,
    },
}
