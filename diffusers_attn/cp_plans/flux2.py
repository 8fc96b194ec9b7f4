"""Flux 2: text and image, joined in every block. All layers are per token, so both are split before the model.

The single blocks use another attention class, which also computes the MLP, per token.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Flux2Transformer2DModel": {
        "": {
            ParamId("kv_cache_mode"): advanced.CPForbidden(
                "the tokens of reference images then attend to themselves only, or come from a cache, and neither is "
                "split. Leave kv_cache_mode out and give the reference images with every step, or run on one device."
            ),
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
            # [batch, tokens, axes] or [tokens, axes].
            ParamId("img_ids"): CPInput(-2, sequence="image"),
            ParamId("txt_ids"): CPInput(-2, sequence="text"),
        },
        "transformer_blocks.*.attn": CPAttention(("text", "image")),
        "single_transformer_blocks.*.attn": CPAttention(("text", "image")),
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
