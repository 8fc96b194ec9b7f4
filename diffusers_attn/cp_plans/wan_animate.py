"""Wan Animate: Wan with adapters after some blocks, which attend frame by frame to the motion of a face.

An adapter divides the full sequence into frames, so every rank computes all of it: little work, with a few keys for
each token.
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
