"""Qwen-Image: text and image, joined in every block, with a mask of the text.

The rotary embedding counts the whole text, so that both are split after it.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "QwenImageTransformer2DModel": {
        "": {ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="image")},
        "pos_embed": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="image"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="text"),
        },
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # Short negative prompts have a handful of tokens, and no tokens cannot be rotated.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {
            ParamId("encoder_hidden_states_mask"): CPInput(1, 2, sequence="text"),
            # Which tokens are of reference images, and modulated otherwise.
            ParamId("modulate_index"): CPInput(1, 2, sequence="image"),
        },
        "transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
