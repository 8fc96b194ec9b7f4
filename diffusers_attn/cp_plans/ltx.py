"""LTX: self-attention over the video; cross-attention to text that all ranks have whole, with its mask: local."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "LTXVideoTransformer3DModel": {
        "": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            # One time per token where frames are given (image to video, conditions), one per sample elsewhere.
            ParamId("timestep"): CPInput(1, 2, sequence="video", leave_other_dims=True),
        },
        "rope": {
            ParamId(index=0): CPInput(1, 3, split_output=True, sequence="video"),
            ParamId(index=1): CPInput(1, 3, split_output=True, sequence="video"),
        },
        "transformer_blocks.*.attn1": CPAttention(("video",)),
        "transformer_blocks.*.attn2": CPAttention(("video",), key=()),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
