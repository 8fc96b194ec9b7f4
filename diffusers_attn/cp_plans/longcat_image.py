"""LongCat-Image: Flux's blocks, split like Flux."""

from .flux import BLOCKS, INPUTS
from .plan import Plan

PLANS: dict[str, Plan] = {"LongCatImageTransformer2DModel": {"": INPUTS, **BLOCKS}}
