"""LongCat-Audio: self-attention over the audio; cross-attention to replicated text with its mask is local.

The audio's mask covers keys, and both attentions' outputs are multiplied by it, so it is split. The input of the blocks
is added to their output.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "LongCatAudioDiTTransformer": {
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="audio")},
        "blocks.*": {
            ParamId("mask"): CPInput(1, 2, sequence="audio"),
            # cos and sin.
            ParamId("rope"): CPInput(0, 2, sequence="audio"),
        },
        "blocks.*.self_attn": CPAttention(("audio",)),
        "blocks.*.cross_attn?": CPAttention(("audio",), key=()),
        "blocks.-1": CPOutput(1, 3, sequence="audio"),
    },
}
