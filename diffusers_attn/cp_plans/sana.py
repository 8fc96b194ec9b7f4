"""Sana: linear attention over the image, local cross-attention to replicated text, and a convolution.

The split entries are rows of the image. Linear attention sums over keys and values before it uses queries. So keys and
values are gathered and its processor is unchanged: the sum is little work, and every rank computes all of it. The
convolution reads one row on either side.
"""

import functools
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan


def _patches(size: int, latents: Any) -> int:
    """Number of rows of patches in the latents."""
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
