"""Kandinsky 6's super-resolution: self-attention over the video, among blocks of 64 tokens that layers choose (NABLA).

Shards are complete blocks. `processors/nabla.py` computes each rank's rows of the mask.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Kandinsky6SRTransformer3DModel": {
        "": {ParamId("hidden_states"): advanced.CPBlocks("video", 64)},
        "visual_transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "visual_transformer_blocks.*": {ParamId("rotary_emb"): CPInput(0, sequence="video")},
        "visual_transformer_blocks.*.self_attention": CPAttention(("video",)),
        # After it, the tokens become frames, rows and columns again.
        "visual_transformer_blocks.-1": CPOutput(1, 3, sequence="video"),
    },
}
