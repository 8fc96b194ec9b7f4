"""HunyuanImage: image and text, joined in every block, with a mask of the text. The replicated text is refined first.

The model puts the valid tokens of two texts before the padding of both, sample by sample; the text is split after that.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

# The mask is replicated.
_ATTENTION = CPAttention(("image", "text"), key_mask=True)

PLANS: dict[str, Plan] = {
    "HunyuanImageTransformer2DModel": {
        "rope": {
            ParamId(index=0): CPInput(0, 2, split_output=True, sequence="image"),
            ParamId(index=1): CPInput(0, 2, split_output=True, sequence="image"),
        },
        "context_embedder.token_refiner.refiner_blocks.*.attn": CPAttention(query=()),
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
            # Blocks cut the text off by its length, counted from the end, where zero would mean everything.
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        "transformer_blocks.*.attn": _ATTENTION,
        "single_transformer_blocks.*.attn": _ATTENTION,
        "proj_out": CPOutput(1, 3, sequence="image"),
    },
}
