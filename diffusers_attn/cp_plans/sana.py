"""Sana: linear attention over the picture, cross-attention to text that all ranks have whole (local), a convolution.

It is rows of the picture that are split. Linear attention sums over keys and values before it comes to queries, so that
gathering those leaves its processor as it is: the sum is little work, and every rank makes all of it. The convolution
looks one row up and down.
"""

import functools
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan


def _patches(size: int, latents: Any) -> int:
    """Of how many rows of patches the latents are."""
    return int(latents.shape[2]) // size


def _plan(model: Any) -> Plan:
    patch = model.config.patch_size
    rows = CPInput(1, 3, sequence="rows", grouped=True)
    return {
        "": {
            ParamId("hidden_states"): advanced.CPLength("rows", of=functools.partial(_patches, patch)),
            ParamId("controlnet_block_samples"): rows,
        },
        "transformer_blocks.0": {ParamId("hidden_states"): rows},
        "transformer_blocks.*": {ParamId("height"): advanced.CPLength("rows")},
        "transformer_blocks.*.attn1": CPAttention(("rows",), key=()),
        "transformer_blocks.*.attn1.to_k": CPOutput(1, 3, sequence="rows", grouped=True),
        "transformer_blocks.*.attn1.to_v": CPOutput(1, 3, sequence="rows", grouped=True),
        "transformer_blocks.*.attn2?": CPAttention(("rows",), key=()),
        "transformer_blocks.*.ff.conv_depth": advanced.CPHalo(2, 1, sequence="rows"),
        "proj_out": CPOutput(1, 3, sequence="rows", grouped=True),
    }


PLANS = {"SanaTransformer2DModel": _plan}
