"""Qwen-Image: text and image, joined in every block, with a mask of the text.

The rotary embedding counts the full text, so both are split after it.
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
            # A short negative prompt may leave a rank without text, but zero tokens cannot be rotated.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*": {
            ParamId("encoder_hidden_states_mask"): CPInput(1, 2, sequence="text"),
            # Marks the tokens of reference images, which are modulated differently.
            ParamId("modulate_index"): CPInput(1, 2, sequence="image"),
        },
        "transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
