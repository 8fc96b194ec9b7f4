"""ConsisID: CogVideoX's blocks, and local attention of the video to a replicated face, outside of any processor.

After the blocks, the model cuts the text off by its full length, so both sequences are gathered before that.
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
