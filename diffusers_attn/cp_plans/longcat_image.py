"""LongCat-Image: Flux's blocks. Split as Flux is."""

from .flux import BLOCKS, INPUTS
from .plan import Plan

PLANS: dict[str, Plan] = {"LongCatImageTransformer2DModel": {"": INPUTS, **BLOCKS}}
