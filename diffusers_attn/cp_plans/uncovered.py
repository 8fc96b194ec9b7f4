"""The classes of diffusers' denoisers that have no plan, with the reason, and what to do instead.

A class is either here or has a plan; a test compares both with what diffusers has, so that a new class is noticed. What
a user registers for one of these classes comes first.
"""

from __future__ import annotations

from typing import NamedTuple


class Uncovered(NamedTuple):
    """Why a class has no plan. Both are whole sentences."""

    reason: str
    instead: str


_ALIKE = "Run it whole, on one device or on every rank alike"
_BATCH = "Run it whole on every rank, and give each samples, or a half of the guidance, of its own."

_UNET = Uncovered(
    "Its convolutions, up- and downsampling and group norms look across the whole picture between any two attention "
    "layers, so that there is no sequence that could stay split.",
    _BATCH,
)
_CONTROLNET = Uncovered(
    "It takes a share of the time only and gives one whole result for every block of another model.",
    "Leave it whole on every rank: the plan of the transformer that it controls splits its results.",
)
_SEVERAL = Uncovered("It only holds several ControlNets, and runs one after the other.", _CONTROLNET.instead)

UNCOVERED: dict[str, Uncovered] = {
    # Transformers.
    "MiniMaxMusic3RVQDepthDecoder": Uncovered(
        "Its sequences have 8 tokens at most, for which any exchange takes longer than what it saves.", f"{_ALIKE}."
    ),
    "PriorTransformer": Uncovered(
        "Its sequences have 81 tokens, for which any exchange takes longer than what it saves.",
        f"{_ALIKE}; the decoder behind it takes nearly all of the time.",
    ),
    "RFD4ProteinaTransformer": Uncovered(
        "It computes with all pairs of residues: each attention has a bias for every pair that its own layers change, "
        "so that rows and columns would have to be split at once.",
        _BATCH,
    ),
    "T5FilmDecoder": Uncovered(
        "Its sequences have 256 tokens, and its processors compute the scores themselves.", f"{_ALIKE}."
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
    "FluxControlNetModel": _CONTROLNET,
    "FluxMultiControlNetModel": _SEVERAL,
    "HunyuanDiT2DControlNetModel": _CONTROLNET,
    "HunyuanDiT2DMultiControlNetModel": _SEVERAL,
    "MultiControlNetModel": _UNET,
    "MultiControlNetUnionModel": _UNET,
    "QwenImageControlNetModel": _CONTROLNET,
    "QwenImageMultiControlNetModel": _SEVERAL,
    "SD3ControlNetModel": _CONTROLNET,
    "SD3MultiControlNetModel": _SEVERAL,
    "SanaControlNetModel": _CONTROLNET,
    "SparseControlNetModel": _UNET,
    "UNetControlNetXSModel": _UNET,
    "ZImageControlNetModel": _CONTROLNET,
}
