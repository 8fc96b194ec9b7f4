"""CogView3+: text and image, joined in every block. One module embeds both, so they are split after it."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "CogView3PlusTransformer2DModel": {
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*.attn1": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
