"""The refiner of SANA-WM: the video's half of LTX 2. Its blocks also have the other half, but never run it.

It refines one window after another. Keys of a window are stored for later ones, replicated, where they come first.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "SanaWMLTX2RefinerTransformer3DModel": {
        "": {
            # Reshaping rotated queries and times infers a dimension, which needs at least one token.
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("timestep"): CPInput(1, 2, sequence="video", leave_other_dims=True),
            # cos and sin: [batch, tokens, channels]; with rope_type="split", [batch, heads, tokens, channels].
            ParamId("video_rotary_emb"): CPInput(-2, sequence="video"),
        },
        "transformer_blocks.*": [
            {ParamId("kv_cache"): advanced.CPStore("store_captured_pre_rope", 1, sequence="video")},
            {ParamId("kv_cache"): advanced.CPStore("store_captured_post_rope", 1, sequence="video")},
        ],
        "transformer_blocks.*.attn1": CPAttention(("video",), prefix="cache"),
        "transformer_blocks.*.attn2": CPAttention(("video",), key=()),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
