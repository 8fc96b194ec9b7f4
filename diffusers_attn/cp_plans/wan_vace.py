"""Wan VACE: Wan with blocks for a control video, which is split like the video and runs before it.

Only the first of these blocks takes the video, which the model passes to all.
"""

from . import wan
from .plan import CPAttention, CPInput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "WanVACETransformer3DModel": {
        **wan.PLANS["WanTransformer3DModel"],
        "vace_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("control_hidden_states"): CPInput(1, 3, sequence="video"),
        },
        "vace_blocks.*.attn1": CPAttention(("video",)),
        "vace_blocks.*.attn2": CPAttention(("video",), key=()),
    }
}
