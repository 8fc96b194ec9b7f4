"""Wan Animate: Wan with adapters after some blocks, which attend frame by frame to the motion of a face.

An adapter divides the sequence into frames, so that it needs it whole: all ranks compute all of it, which is little, a
few keys for every token.
"""

from . import advanced, wan
from .plan import CPAttention, CPInput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "WanAnimateTransformer3DModel": {
        **wan.PLANS["WanTransformer3DModel"],
        "face_adapter.*": [
            {ParamId("hidden_states"): advanced.CPGatherInput(1, 3, sequence="video")},
            CPAttention(query=()),
            {ParamId(index=0): CPInput(1, 3, split_output=True, sequence="video")},
        ],
    }
}
