"""Cosmos 3: text with causal self-attention; and video, sound and actions, which attend to the text and each other.

There is no batch: tokens are the first dimension. One module makes both attention calls of a layer. The text is
replicated, so its own call is local. Everything else is one sequence, from which the model takes its parts by their
positions.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_TEXT = CPInput(0, 2, sequence="text")
_PACKED = CPInput(0, 2, sequence="packed")

PLANS: dict[str, Plan] = {
    "Cosmos3OmniTransformer": {
        "layers.0": {ParamId("und_seq"): _TEXT, ParamId("gen_seq"): _PACKED},
        # cos and sin of the text, then of the rest.
        "layers.*": {ParamId("rotary_emb"): [_TEXT, _TEXT, _PACKED, _PACKED]},
        "layers.*.self_attn": CPAttention(("packed",), prefix="text"),
        "norm_moe_gen": CPOutput(0, 2, sequence="packed"),
    },
}
