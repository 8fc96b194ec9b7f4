"""AnyFlow FAR: AnyFlow's blocks over chunks of frames. Earlier chunks are compressed, and a chunk attends to them.

The split tokens are all that a forward computes: [compressed, full, clean], or the chunk that is generated from a cache
of keys, which is replicated. `processors/anyflow_far.py` handles positions in the sequence. After the last block, the
model modulates by the times of all tokens and selects frames, so tokens are gathered there.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "AnyFlowFARTransformer3DModel": {
        "": {ParamId("kv_cache"): advanced.CPCache()},
        "condition_embedder": {ParamId(index=1): CPInput(1, 3, split_output=True, sequence="video")},
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "blocks.*": {
            ParamId("rotary_emb"): {
                "query": CPInput(2, 4, sequence="video"),
                "key": CPInput(2, 4, sequence=("cached", "video")),
            }
        },
        "blocks.*.attn1": CPAttention(("video",), prefix="cached", row_mask=True, bound=True),
        "blocks.*.attn2": CPAttention(("video",), key=()),
        "blocks.-1": CPOutput(1, 3, sequence="video"),
    },
}
