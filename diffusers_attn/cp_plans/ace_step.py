"""ACE-Step: self-attention over the audio; cross-attention to replicated text, lyrics and timbre is local.

Every other layer attends within a window, by a mask with a row for each query; each rank takes its queries' rows.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "AceStepTransformer1DModel": {
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="audio")},
        "layers.*": {
            # cos and sin.
            ParamId("position_embeddings"): CPInput(0, 2, sequence="audio"),
            ParamId("attention_mask"): CPInput(2, 4, sequence="audio"),
        },
        "layers.*.self_attn": CPAttention(("audio",), row_mask=True),
        "layers.*.cross_attn": CPAttention(("audio",), key=()),
        "norm_out": CPOutput(1, 3, sequence="audio"),
    },
}
