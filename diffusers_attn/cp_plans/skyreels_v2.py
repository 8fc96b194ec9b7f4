"""SkyReels V2: Wan's blocks. Frames may have times of their own (diffusion forcing) and attend to earlier ones only.

Each rank takes its queries' rows of the causal mask. After the last block, the model modulates by the times of all
tokens, so tokens are gathered there.
"""

from . import wan
from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "SkyReelsV2Transformer3DModel": {
        "rope": wan.PLANS["WanTransformer3DModel"]["rope"],
        "blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        "blocks.*": {
            # [batch, 6, tokens, channels], or one time per sample.
            ParamId("temb"): CPInput(2, 4, sequence="video", leave_other_dims=True),
            ParamId("attention_mask"): CPInput(2, 4, sequence="video"),
        },
        "blocks.*.attn1": CPAttention(("video",), row_mask=True),
        "blocks.*.attn2": CPAttention(("video",), key=()),
        "blocks.-1": CPOutput(1, 3, sequence="video"),
    },
}
