"""Framepack: HunyuanVideo's blocks, with the frames before the video in front of it and an image in front of the text.

The model takes the video from the end of the whole sequence, so that it is gathered before, behind the last block.
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
