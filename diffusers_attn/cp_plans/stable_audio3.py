"""Stable Audio 3: self-attention over memory tokens and the audio; cross-attention to text that all ranks have whole:
local. Differential attention is two calls of each.

What is known of audio that is kept (`local_add_cond`) is added in every block behind the memory tokens, by how many
those are: they are a sequence of their own, so that their number on a rank is right there.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("memory", "audio")

PLANS: dict[str, Plan] = {
    "StableAudio3DiTModel": {
        # The number first: the audio's length is what it leaves.
        "transformer_blocks.*": {
            ParamId("num_memory_tokens"): advanced.CPLength("memory"),
            ParamId("rope"): CPInput(0, 2, sequence=_JOINED),
            ParamId("local_seq"): CPInput(1, 3, sequence="audio"),
        },
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence=_JOINED)},
        "transformer_blocks.*.self_attn": CPAttention(_JOINED),
        "transformer_blocks.*.cross_attn": CPAttention(_JOINED, key=()),
        "transformer_blocks.-1": CPOutput(1, 3, sequence=_JOINED),
    },
}
