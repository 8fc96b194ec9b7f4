"""Wan: self-attention over the video; cross-attention to replicated text (and an image) is local."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "WanTransformer3DModel": {
        # One time per token in Wan 2.2 TI2V, one per sample in the others.
        "": {ParamId("timestep"): CPInput(1, 2, sequence="video", leave_other_dims=True)},
        "rope": {
            ParamId(index=0): CPInput(1, 4, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(1, 4, split_output=True, sequence="video"),
        },
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "blocks.*.attn1": CPAttention(("video",)),
        "blocks.*.attn2": CPAttention(("video",), key=()),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
