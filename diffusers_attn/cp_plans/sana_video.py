"""Sana's video model: linear attention over the video, local cross-attention to replicated text, convolutions.

The split entries are frames, so only the convolution over time reads beyond a shard, by one frame on either side.
Linear attention rotates queries and keys by the same embedding, so both must have the same tokens. Where Sana gathers
keys and values, queries are gathered here, too, and each rank keeps its own part of the output, before the last
projection. Every rank computes the full sum, which is little work beside the projections and convolutions.
"""

import functools
from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan


def _patches(size: int, latents: Any) -> int:
    """Number of frames of patches in the latents."""
    return int(latents.shape[2]) // size


def _plan(model: Any) -> Plan:
    patch, _, _ = model.config.patch_size
    frames = CPInput(1, 3, sequence="frames", grouped=True)
    gathered = CPOutput(1, 3, sequence="frames", grouped=True)
    # One for all tokens, or one per token, for example if the first frame is given.
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
