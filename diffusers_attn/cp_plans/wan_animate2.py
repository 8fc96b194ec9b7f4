"""Wan Animate 2: a pass over a reference fills a cache; others attend to the video and, frame by frame, the cache.

The tokens of each pass are split. Every rank has its shard of the cache, as the first pass leaves it there.
`processors/wan_animate2.py` handles positions in the sequence. The sequence "nothing" are keys of zeros, which it may
put before the others.
"""

from typing import Any

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan


def _tokens(grid_sizes: Any) -> int:
    """Number of tokens of a reference from its frames, rows and columns."""
    frames, height, width = grid_sizes[0].tolist()
    return frames * height * width


PLANS: dict[str, Plan] = {
    "WanAnimate2Transformer3DModel": {
        "blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("reference_grid_sizes"): advanced.CPLength("reference", of=_tokens),
        },
        "blocks.*.self_attn": CPAttention(("video",), key=("video", "reference"), prefix="nothing", bound=True),
        "blocks.*.cross_attn": CPAttention(("video",), key=()),
        "head": CPOutput(1, 3, sequence="video"),
    },
}
