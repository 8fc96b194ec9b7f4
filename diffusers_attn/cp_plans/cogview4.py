"""CogView4: text and image, joined in every block. One module embeds both, so they are split after it."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "CogView4Transformer2DModel": {
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {
            # cos and sin of the image's tokens.
            ParamId("image_rotary_emb"): CPInput(0, 2, sequence="image"),
            ParamId("attention_mask"): CPInput(1, 2, sequence="text"),
        },
        "transformer_blocks.*.attn1": CPAttention(("text", "image"), outer_mask=True),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
