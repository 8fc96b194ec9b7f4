"""Flux: text and image, joined in every block. All layers are per token, so both are split before the model.

Images of an IP-Adapter are replicated, and attention to them is local.
"""

from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan

JOINED = ("text", "image")
INPUTS: InputPlan = {
    ParamId("hidden_states"): CPInput(1, 3, sequence="image"),
    ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
    # [tokens, axes], or [batch, tokens, axes] in older pipelines.
    ParamId("img_ids"): CPInput(-2, sequence="image"),
    ParamId("txt_ids"): CPInput(-2, sequence="text"),
}
# Queries by keys: a rank takes its queries' rows. A mask with one row for all queries is not split.
MASK = CPInput(2, 4, sequence=JOINED, leave_other_dims=True)
BLOCKS: Plan = {
    "transformer_blocks.*.attn": CPAttention(JOINED),
    "single_transformer_blocks.*.attn": CPAttention(JOINED),
    "proj_out": CPOutput(1, 3, sequence="image"),
}

PLANS: dict[str, Plan] = {
    "FluxTransformer2DModel": {
        "": {
            **INPUTS,
            ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="image"),
            ParamId("controlnet_single_block_samples"): CPInput(1, 3, sequence="image"),
            ParamId("joint_attention_kwargs"): {"attention_mask": MASK},
        },
        **BLOCKS,
    },
}
