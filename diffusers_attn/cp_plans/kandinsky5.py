"""Kandinsky 5: self-attention over the video; cross-attention to replicated text is local.

With `sparse_params`, each self-attention chooses which blocks of 64 tokens attend to each other (NABLA), so shards are
complete blocks. `processors/nabla.py` computes each rank's rows of that mask.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Kandinsky5Transformer3DModel": {
        "": {ParamId("sparse_params"): advanced.CPBlocks("video", 64)},
        "text_transformer_blocks.*.self_attention": CPAttention(query=()),
        "visual_transformer_blocks.0": {ParamId("visual_embed"): CPInput(1, 3, sequence="video")},
        "visual_transformer_blocks.*": {ParamId("rope"): CPInput(1, sequence="video")},
        "visual_transformer_blocks.*.self_attention": CPAttention(("video",)),
        "visual_transformer_blocks.*.cross_attention": CPAttention(("video",), key=()),
        # After it, the tokens become frames, rows and columns again.
        "visual_transformer_blocks.-1": CPOutput(1, 3, sequence="video"),
    },
}
