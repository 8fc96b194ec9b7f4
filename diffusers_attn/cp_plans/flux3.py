"""Flux 3: text, image and an optional reference image. In the first blocks each attends to itself, then all are joined.

All layers are per token, so all three are split before the model.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Flux3Transformer2DModel": {
        "": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # Zero tokens cannot be rotated alone.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
            ParamId("image_cond_hidden_states"): CPInput(1, 3, sequence="reference"),
            ParamId("img_ids"): CPInput(0, 2, sequence="image"),
            ParamId("txt_ids"): CPInput(0, 2, sequence="text"),
            ParamId("image_cond_ids"): CPInput(0, 2, sequence="reference"),
        },
        "txt_mode_blocks.*.attn": CPAttention(("text",)),
        "mode_blocks.image.*.attn": CPAttention(("image",)),
        "mode_blocks.image_cond.*.attn": CPAttention(("reference",)),
        "single_transformer_blocks.*.attn": CPAttention(("text", "image", "reference")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
