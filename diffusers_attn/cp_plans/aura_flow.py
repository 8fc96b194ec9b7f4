"""AuraFlow: text and image, joined in every block.

Before the text come eight learned tokens, so that it is split before the first block.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # No tokens cannot be divided into heads.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "joint_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "single_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
