"""AnyFlow: Wan's blocks. Each token has its own times, which the embedder repeats for all tokens of a frame."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_ROTARY = CPInput(2, 4, split_output=True, sequence="video")
_TIMES = CPInput(1, 3, split_output=True, sequence="video")

PLANS: dict[str, Plan] = {
    "AnyFlowTransformer3DModel": {
        "rope": {ParamId("query"): _ROTARY, ParamId("key"): _ROTARY},
        "condition_embedder": {ParamId(index=0): _TIMES, ParamId(index=1): _TIMES},
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "blocks.*.attn1": CPAttention(("video",)),
        "blocks.*.attn2": CPAttention(("video",), key=()),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
