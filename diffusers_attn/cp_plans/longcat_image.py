"""LongCat-Image: Flux's blocks. Split as Flux is."""

from .flux import BEHIND_THE_DOOR, DOOR
from .plan import Plan

PLANS: dict[str, Plan] = {"LongCatImageTransformer2DModel": {"": DOOR, **BEHIND_THE_DOOR}}
