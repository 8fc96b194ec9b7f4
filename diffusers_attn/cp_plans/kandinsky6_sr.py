"""Kandinsky 6's super-resolution: self-attention over the video, by blocks of 64 tokens that layers choose (NABLA).

Ranks have whole blocks. `processors/nabla.py` makes each rank's rows of that choice.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Kandinsky6SRTransformer3DModel": {
        "": {ParamId("hidden_states"): advanced.CPBlocks("video", 64)},
        "visual_transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "visual_transformer_blocks.*": {ParamId("rotary_emb"): CPInput(0, sequence="video")},
        "visual_transformer_blocks.*.self_attention": CPAttention(("video",)),
        # Behind it the tokens become frames, rows and columns again.
        "visual_transformer_blocks.-1": CPOutput(1, 3, sequence="video"),
    },
}
