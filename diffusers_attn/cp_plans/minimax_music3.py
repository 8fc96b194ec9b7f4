"""MiniMax Music 3: self-attention over a time token and the audio, which are one sequence."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "MiniMaxMusic3Transformer1DModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="audio")},
        # cos and sin.
        "transformer_blocks.*": {ParamId("rotary_emb"): CPInput(0, 2, sequence="audio")},
        "transformer_blocks.*.attn": CPAttention(("audio",)),
        "transformer_blocks.-1": CPOutput(1, 3, sequence="audio"),
    },
}
