"""CogVideoX: text and video, joined in every block. One module embeds both, so they are split after it."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "CogVideoXTransformer3DModel": {
        "transformer_blocks.0": {
            ParamId("hidden_states"): CPInput(1, 3, sequence="video"),
            ParamId("encoder_hidden_states"): CPInput(1, 3, sequence="text"),
        },
        # cos and sin of the video's tokens.
        "transformer_blocks.*": {ParamId("image_rotary_emb"): CPInput(0, 2, sequence="video")},
        "transformer_blocks.*.attn1": CPAttention(("text", "video")),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
