"""Framepack: HunyuanVideo's blocks, with history frames before the video and an image before the text.

The model takes the video from the end of the full sequence, so it is gathered before that, after the last block.
"""

from .hunyuan_video import joined, rotated
from .plan import CPOutput, Plan

PLANS: dict[str, Plan] = {
    "HunyuanVideoFramepackTransformer3DModel": {
        **rotated("video"),
        **joined("video"),
        "single_transformer_blocks.-1": CPOutput(1, 3, sequence="video"),
    }
}
