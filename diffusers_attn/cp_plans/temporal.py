"""TransformerTemporalModel: attention over the frames of every pixel. Each pixel is a sample.

Pixels are split, so attention is local.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "TransformerTemporalModel": {
        "transformer_blocks.0": {ParamId("hidden_states"): CPInput(0, 3, sequence="pixels")},
        "transformer_blocks.*": {ParamId("encoder_hidden_states"): CPInput(0, 3, sequence="pixels")},
        "transformer_blocks.*.attn1": CPAttention(query=()),
        "transformer_blocks.*.attn2?": CPAttention(query=()),
        "proj_out": CPOutput(0, 3, sequence="pixels"),
    },
}
