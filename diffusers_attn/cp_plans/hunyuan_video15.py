"""HunyuanVideo 1.5: video and text, joined in every block. The text is an image and two texts, followed by padding.

The processor makes its mask, an outer product, from the text's mask, which is split with the text. It cuts the text off
by its length, counted from the end, where a length of zero would mean everything. The first text is refined while it is
replicated.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "HunyuanVideo15Transformer3DModel": {
        "rope": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="video"),
        },
        "context_embedder.token_refiner.refiner_blocks.*.attn": CPAttention(query=()),
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {ParamId("attention_mask"): CPInput(1, 2, sequence="text")},
        "transformer_blocks.*.attn": CPAttention(("video", "text"), outer_mask=True),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
