"""Cosmos: self-attention over the video; cross-attention to replicated text (and an image) is local."""

from .plan import CPAttention, CPInput, CPOutput, InputPlan, ParamId, Plan

# [batch, tokens, channels] if frames have times of their own, else one per sample.
_TIMES: InputPlan = {
    ParamId("temb"): CPInput(1, 3, sequence="video", leave_other_dims=True),
    ParamId("embedded_timestep"): CPInput(1, 3, sequence="video", leave_other_dims=True),
}

PLANS: dict[str, Plan] = {
    "CosmosTransformer3DModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "transformer_blocks.*": {
            **_TIMES,
            ParamId("image_rotary_emb"): CPInput(0, 2, sequence="video"),
            ParamId("extra_pos_emb"): CPInput(1, 3, sequence="video"),
            ParamId("controlnet_residual"): CPInput(1, 3, sequence="video"),
        },
        "transformer_blocks.*.attn1": CPAttention(("video",)),
        "transformer_blocks.*.attn2": CPAttention(("video",), key=()),
        "norm_out": _TIMES,
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
