"""Wan VACE: Wan with blocks for a control video, which is split as the video is, and run before.

Of them only the first takes the video, which the model hands to all.
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
