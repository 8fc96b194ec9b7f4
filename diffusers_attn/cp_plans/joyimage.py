"""JoyImage Edit and Edit Plus: image and text, joined in every block.

Edit Plus accepts several images of any size, padded, with a replicated mask of text and images.
"""

from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan

_FIRST: InputPlan = {
    ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
    # With rope_type="mrope" the text is rotated, which needs at least one token.
    ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
}
_JOINED = ("image", "text")

PLANS: dict[str, Plan] = {
    "JoyImageEditTransformer3DModel": {
        "double_blocks.0": _FIRST,
        "double_blocks.*": {
            # cos and sin of the image and, with rope_type="mrope", of the text.
            ParamId("image_rotary_emb"): [CPInput(0, 2, sequence="image"), CPInput(0, 2, sequence="text")],
        },
        "double_blocks.*.attn": CPAttention(_JOINED),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "double_blocks.0": _FIRST,
        "double_blocks.*": {ParamId("image_rotary_emb"): CPInput(1, 3, sequence="image")},
        "double_blocks.*.attn": CPAttention(_JOINED, key_mask=True),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
