"""Stable Audio 3: self-attention over memory tokens and the audio; cross-attention to replicated text is local.

Differential attention makes each call twice. Every block adds `local_add_cond`, the embedding of audio that is kept,
after the memory tokens, by their number. So these are a sequence of their own, and a rank has the right number of them.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_JOINED = ("memory", "audio")

PLANS: dict[str, Plan] = {
    "StableAudio3DiTModel": {
        # The memory tokens' number comes first: the rest of the joined length is the audio's.
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
