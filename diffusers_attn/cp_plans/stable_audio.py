"""Stable Audio: self-attention over a global token and the audio, one sequence; cross-attention to text is local.

The text is replicated, with its mask. A mask of the audio covers all keys.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "StableAudioDiTModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="audio")},
        # cos and sin.
        "transformer_blocks.*": {ParamId("rotary_embedding"): CPInput(0, 2, sequence="audio")},
        "transformer_blocks.*.attn1": CPAttention(("audio",), key_mask=True),
        "transformer_blocks.*.attn2": CPAttention(("audio",), key=()),
        "proj_out": CPOutput(1, 3, sequence="audio"),
    },
}
