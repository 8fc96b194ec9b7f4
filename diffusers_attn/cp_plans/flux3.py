"""Flux 3: text, image and a reference image, which may be missing. In the first blocks each attends to itself, then all
are joined. Everything is per token, so that all are split at the door.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Flux3Transformer2DModel": {
        "": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # No tokens cannot be rotated by themselves.
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
