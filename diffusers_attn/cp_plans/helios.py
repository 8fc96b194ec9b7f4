"""Helios: self-attention over [history, video], cross-attention of the video to text that all ranks have whole: local.

Both are split once, before the first block, each on its own. So a rank's tokens are its history and its video, in this
order, and what the blocks do by the video's length (cross-attention of the video only, larger keys of the history, the
output) is right with the length of this rank's video.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("history", "video")

PLANS: dict[str, Plan] = {
    "HeliosTransformer3DModel": {
        # Before the first block's hidden states: the history's length is what the video's leaves.
        "blocks.*": {
            ParamId("original_context_length"): advanced.CPLength("video"),
            ParamId("temb"): CPInput(1, 4, sequence=_JOINED),
            ParamId("rotary_emb"): CPInput(1, 3, sequence=_JOINED),
        },
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence=_JOINED)},
        "blocks.*.attn1": CPAttention(_JOINED),
        "blocks.*.attn2": CPAttention(("video",), key=()),
        "norm_out": {
            ParamId("original_context_length"): advanced.CPLength("video"),
            ParamId("temb"): CPInput(1, 3, sequence=_JOINED),
        },
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
