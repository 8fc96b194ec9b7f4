"""Hunyuan-DiT: self-attention over the image; cross-attention to replicated text is local.

The second half of the blocks gets the outputs of the first half, token by token. The text's mask replaces tokens.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "HunyuanDiT2DModel": {
        "": {ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="image")},
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
        # cos and sin; a single row is for all tokens.
        "blocks.*": {ParamId("image_rotary_emb"): CPInput(0, 2, sequence="image", leave_other_dims=True)},
        "time_extra_emb.pooler": CPAttention((), key=()),  # over the text
        "blocks.*.attn1": CPAttention(("image",)),
        "blocks.*.attn2": CPAttention(("image",), key=()),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
