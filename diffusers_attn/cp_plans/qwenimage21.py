"""Qwen-Image 2.1: text, input images and the generated image in one sequence. Each attends to itself and earlier parts.

The model makes a call for each part before the generated image, which are text and input images by turns, by their
positions. These parts are replicated, and their attention is local. The generated image is split. With `kv_cache`, the
first step stores the keys of the parts before the image, replicated. Later steps run only the image, and put these keys
before the rank's own.
"""

import math
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("before", "image")


def _image_tokens(img_shapes: Any) -> int:
    """Number of tokens of the generated image, the last one. All samples of a batch have the same layout."""
    return math.prod(img_shapes[0][-1])


PLANS: dict[str, Plan] = {
    "QwenImage21Transformer2DModel": {
        "": {ParamId("img_shapes"): advanced.CPLength("image", of=_image_tokens)},
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence=_JOINED)},
        "transformer_blocks.*": {
            ParamId("rotary_emb"): CPInput(0, 2, sequence=_JOINED),
            # Marks the tokens of the image, which are modulated by the time.
            ParamId("target_token_mask"): CPInput(0, 1, sequence=_JOINED),
        },
        "transformer_blocks.*.attn": CPAttention(("image",), prefix="before", key_mask=True),
        "norm_out": {ParamId("target_token_mask"): CPInput(0, 1, sequence=_JOINED)},
        "proj_out": CPOutput(1, 3, sequence=_JOINED),
    },
}
