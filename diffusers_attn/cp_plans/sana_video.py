"""Sana's video model: linear attention over the whole video, cross-attention to text that all ranks have whole (local),
convolutions in space and in time.

It is whole frames that are split, so that only the convolution in time looks beyond a shard, one frame either way.
Linear attention rotates queries and keys by one and the same embedding, so that both must be of the same tokens: where
Sana gathers keys and values, here queries are gathered, too, and each rank keeps its own of what comes out, before the
last projection. Every rank makes all of the sum, which is little work beside the projections and convolutions.
"""

import functools
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan


def _patches(size: int, latents: Any) -> int:
    """Of how many frames of patches the latents are."""
    return int(latents.shape[2]) // size


def _plan(model: Any) -> Plan:
    patch, _, _ = model.config.patch_size
    frames = CPInput(1, 3, sequence="frames", grouped=True)
    gathered = CPOutput(1, 3, sequence="frames", grouped=True)
    # One for all tokens, or for each its own, as where the first frame is given.
    times = CPInput(1, 3, sequence="frames", grouped=True, leave_other_dims=True)
    return {
        "": {
            ParamId("hidden_states"): advanced.CPLength("frames", of=functools.partial(_patches, patch)),
            ParamId("controlnet_block_samples"): frames,
        },
        "transformer_blocks.0": {ParamId("hidden_states"): frames},
        "transformer_blocks.*": {ParamId("timestep"): times, ParamId("frames"): advanced.CPLength("frames")},
        "transformer_blocks.*.attn1": CPAttention(("frames",), key=()),
        "transformer_blocks.*.attn1.to_q": gathered,
        "transformer_blocks.*.attn1.to_k": gathered,
        "transformer_blocks.*.attn1.to_v": gathered,
        "transformer_blocks.*.attn1.to_out.0": {ParamId(index=0): frames},
        "transformer_blocks.*.attn2": CPAttention(("frames",), key=()),
        "transformer_blocks.*.ff.conv_temp": advanced.CPHalo(2, 1, sequence="frames"),
        "norm_out": {ParamId("temb"): times},
        "proj_out": gathered,
    }


PLANS = {"SanaVideoTransformer3DModel": _plan}
