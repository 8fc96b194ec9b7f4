"""HunyuanVideo 1.5: video and text, joined in every block. The text is an image and two texts, with the padding behind.

The processor makes its mask, an outer product, of the text's, which is split with it. It cuts the text off by its
length, from the end, where no text would mean all. The refiner of the first text sees it whole.
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
