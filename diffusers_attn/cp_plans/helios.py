"""Helios: self-attention over [history, video]; cross-attention of the video to replicated text is local.

History and video are split separately before the first block, so a rank's tokens are its history followed by its video.
The blocks use the video's length for cross-attention, for larger keys of the history, and for the output; they receive
the length of this rank's video.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("history", "video")

PLANS: dict[str, Plan] = {
    "HeliosTransformer3DModel": {
        # Before the first block's hidden states: the rest of their joined length is the history's.
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
