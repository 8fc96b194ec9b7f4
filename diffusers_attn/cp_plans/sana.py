"""Sana: linear attention over the image, local cross-attention to replicated text, and a convolution.

The split entries are rows of the image. Linear attention sums over keys and values before it uses queries. So keys and
values are gathered and its processor is unchanged: the sum is little work, and every rank computes all of it. The
convolution reads one row on either side.
"""

import functools
from typing import Any, cast

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan

ROWS = CPInput(1, 3, sequence="rows", grouped=True)
GATHERED = CPOutput(1, 3, sequence="rows", grouped=True)


def _patches(size: int, latents: Any) -> int:
    """Number of rows of patches in the latents."""
    return int(latents.shape[2]) // size


def split_rows(model: Any) -> Plan:
    """Where the blocks of Sana, or of its ControlNet, are split."""
    patch = model.config.patch_size
    return {
        "": {ParamId("hidden_states"): advanced.CPLength("rows", of=functools.partial(_patches, patch))},
        "transformer_blocks.0": {ParamId("hidden_states"): ROWS},
        "transformer_blocks.*": {ParamId("height"): advanced.CPLength("rows")},
        "transformer_blocks.*.attn1": CPAttention(("rows",), key=()),
        "transformer_blocks.*.attn1.to_k": GATHERED,
        "transformer_blocks.*.attn1.to_v": GATHERED,
        "transformer_blocks.*.attn2?": CPAttention(("rows",), key=()),
        "transformer_blocks.*.ff.conv_depth": advanced.CPHalo(2, 1, sequence="rows"),
    }


def _plan(model: Any) -> Plan:
    plan = split_rows(model)
    return {
        **plan,
        "": {**cast(InputPlan, plan[""]), ParamId("controlnet_block_samples"): ROWS},
        "proj_out": GATHERED,
    }


PLANS = {"SanaTransformer2DModel": _plan}
