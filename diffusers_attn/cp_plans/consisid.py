"""ConsisID: CogVideoX's blocks, and attention of the video to a face that all ranks have whole, in no processor: local.

Behind the blocks the model cuts the text off by the length that it had, so that both are gathered before.
"""

from . import cogvideox
from .plan import CPAttention, CPOutput, Plan

PLANS: dict[str, Plan] = {
    "ConsisIDTransformer3DModel": {
        **{name: spec for name, spec in cogvideox.PLANS["CogVideoXTransformer3DModel"].items() if name != "proj_out"},
        "transformer_blocks.-1": [CPOutput(1, 3, sequence="video"), CPOutput(1, 3, sequence="text")],
        "perceiver_cross_attention?.*": CPAttention((), key=()),
    }
}
