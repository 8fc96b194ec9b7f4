"""The classes of diffusers' denoisers that have no plan, with the reason and what to do instead.

Every class is either here or has a plan; a test compares both with diffusers, so that a new class is noticed. A plan
that a user registers for one of these classes takes precedence.
"""

from __future__ import annotations

from typing import NamedTuple


class Uncovered(NamedTuple):
    """A class without a plan. Both fields are full sentences."""

    reason: str
    """Why it has no plan."""
    instead: str
    """What to do instead."""


_UNSPLIT = "Run it unsplit, on one device or equally on every rank"
_BATCH = "Run it unsplit on every rank, and give each rank its own samples, or one half of classifier-free guidance."

_UNET = Uncovered(
    "Its convolutions, resampling layers and group norms need the entire image between any two attention layers, so no "
    "sequence could stay split.",
    _BATCH,
)
_CONTROLNET = Uncovered(
    "It takes a small part of the time, and its results are inputs of another model's blocks.",
    "Run it unsplit on every rank: the plan of the transformer that it controls splits its results.",
)
_SEVERAL = Uncovered(
    "It only holds several ControlNets, and runs one after the other.",
    "Call enable_context_parallel(pipe), which splits each of them, or enable_context_parallel(model.nets[0]).",
)

UNCOVERED: dict[str, Uncovered] = {
    # Transformers.
    "MiniMaxMusic3RVQDepthDecoder": Uncovered(
        "Its sequences have at most 8 tokens, for which an exchange takes longer than it saves.", f"{_UNSPLIT}."
    ),
    "PriorTransformer": Uncovered(
        "Its sequences have 81 tokens, for which an exchange takes longer than it saves.",
        f"{_UNSPLIT}; the decoder that follows takes nearly all of the time.",
    ),
    "RFD4ProteinaTransformer": Uncovered(
        "It computes with all pairs of residues: each attention has a bias for every pair, which its layers update, so "
        "both rows and columns would have to be split.",
        _BATCH,
    ),
    "T5FilmDecoder": Uncovered(
        "Its sequences have 256 tokens, and its processors compute the scores themselves.", f"{_UNSPLIT}."
    ),
    # UNets.
    "DreamLiteUNetModel": _UNET,
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": _UNET,
    "MotionAdapter": Uncovered("It only holds weights that a UNetMotionModel takes over.", _UNET.instead),
    "StableCascadeUNet": _UNET,
    "UNet1DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "UVit2DModel": _UNET,
    # ControlNets.
    "ControlNetModel": _UNET,
    "ControlNetUnionModel": _UNET,
    "ControlNetXSAdapter": Uncovered("It only holds weights that a UNetControlNetXSModel takes over.", _UNET.instead),
    "CosmosControlNetModel": _CONTROLNET,
    "FluxMultiControlNetModel": _SEVERAL,
    "HunyuanDiT2DMultiControlNetModel": _SEVERAL,
    "MultiControlNetModel": _UNET,
    "MultiControlNetUnionModel": _UNET,
    "QwenImageMultiControlNetModel": _SEVERAL,
    "SD3MultiControlNetModel": _SEVERAL,
    "SparseControlNetModel": _UNET,
    "UNetControlNetXSModel": _UNET,
    "ZImageControlNetModel": Uncovered(
        "It runs modules of the transformer that it controls, and these run only within that model while it is split.",
        "Run its pipelines on one device, without context parallelism.",
    ),
}
