"""Allegro: self-attention over the video; cross-attention to replicated text with its mask is local."""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "AllegroTransformer3DModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="video")},
        # Tables of angles, and each token's indices into them.
        "transformer_blocks.*": {ParamId("image_rotary_emb"): [None, CPInput(1, 2, sequence="video")]},
        # The processor pads a mask that is longer than this rank's tokens.
        "transformer_blocks.*.attn1": CPAttention(("video",), key_mask=True),
        "transformer_blocks.*.attn2": CPAttention(("video",), key=()),
        "proj_out": CPOutput(1, 3, sequence="video"),
    },
}
