"""Flux: text and image, joined in every block. Everything is per token, so that both are split at the door."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "FluxTransformer2DModel": {
        "": {
            ParamId("hidden_states"): CPInput(1, 3, stream="image"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, stream="text"),
            ParamId("img_ids"): CPInput(0, 2, stream="image"),
            ParamId("txt_ids"): CPInput(0, 2, stream="text"),
            ParamId("controlnet_block_samples"): CPInput(1, 3, stream="image"),
            ParamId("controlnet_single_block_samples"): CPInput(1, 3, stream="image"),
        },
        "transformer_blocks.*.attn": CPAttention(("text", "image")),
        "single_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, stream="image"),
    },
}
