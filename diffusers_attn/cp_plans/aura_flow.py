"""AuraFlow: text and image, joined in every block.

The model puts eight learned tokens before the text, so the text is split after that, before the first block.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # Zero tokens cannot be reshaped to heads.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "joint_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "single_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
