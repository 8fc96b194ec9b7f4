"""LongCat-Audio: self-attention over the audio; cross-attention to text that all ranks have whole, with its mask.

The audio's mask is of keys, and what comes out of both attentions is multiplied by it, so that it is split. What went
into the blocks is added to what comes out of them.
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
