"""EasyAnimate: text and video, joined in every block."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "EasyAnimateTransformer3DModel": {
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
