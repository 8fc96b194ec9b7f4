"""Tiny random models of diffusers, one case for every way in which they call attention.

    from diffusers_attn.tiny_models import CASES, outputs

    case = CASES["flux"]
    tensors = outputs(case.build()(**case.inputs()))

`diffusers-attn verify CLASS` and `diffusers-attn models CLASS` run them, and so do the tests. Adding a case means
adding a decorated function to one of the family modules; see `case.case`. Models may write into their inputs (caches,
lists): draw new ones for every forward.
"""

from . import (  # noqa: F401  (they register their cases)
    audio,
    controlnet,
    image_cross,
    image_flux,
    image_joint,
    image_single,
    packed,
    protein,
    unet,
    video_cross,
    video_joint,
    video_wan,
)
from .case import BATCH, CASES, Case, Inputs, outputs

__all__ = ["BATCH", "CASES", "Case", "Inputs", "outputs"]
