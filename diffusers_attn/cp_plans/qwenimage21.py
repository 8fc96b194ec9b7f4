"""Qwen-Image 2.1: text, given images and the image that is made in one sequence, each of which sees itself and what
comes before it.

All that comes before the image is called in pieces, text and given images by turns, by their places in the whole: it
stays whole on all ranks, and attends to itself there. The image is split. With `kv_cache`, the first step keeps the
keys of what comes before, and later steps are given the image alone and take them from there: also whole, and also
before those of the rank.
"""

import math
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("before", "image")


def _image_tokens(img_shapes: Any) -> int:
    """Of the last image, in a batch of samples that are all laid out alike."""
    return math.prod(img_shapes[0][-1])


PLANS: dict[str, Plan] = {
    "QwenImage21Transformer2DModel": {
        "": {ParamId("img_shapes"): advanced.CPLength("image", of=_image_tokens)},
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence=_JOINED)},
        "transformer_blocks.*": {
            ParamId("rotary_emb"): CPInput(0, 2, sequence=_JOINED),
            # Which tokens are of the image, and modulated by the time.
            ParamId("target_token_mask"): CPInput(0, 1, sequence=_JOINED),
        },
        "transformer_blocks.*.attn": CPAttention(("image",), prefix="before", key_mask=True),
        "norm_out": {ParamId("target_token_mask"): CPInput(0, 1, sequence=_JOINED)},
        "proj_out": CPOutput(1, 3, sequence=_JOINED),
    },
}
