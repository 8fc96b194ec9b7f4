"""The refiner of SANA-WM: the video's half of LTX 2. Its blocks have the other half, too, and never run it.

It refines window after window. The keys of one are kept for later ones, where they come first, whole on every rank.
"""

from . import advanced
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "SanaWMLTX2RefinerTransformer3DModel": {
        "": {
            # Where the model reshapes rotated queries and times, it infers a dimension, which it cannot of no token.
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("timestep"): CPInput(1, 2, sequence="video", leave_other_dims=True),
            # cos and sin: [batch, tokens, channels], or by heads (rope_type="split"), [batch, heads, tokens, channels].
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
