"""Cosmos 3: text, which sees itself causally, and video, sound and actions, which see the text and one another.

There is no batch: tokens are the first dimension. Both calls of a layer are made by one module. The text stays whole on
all ranks, where the first of them is local; all else is one sequence, and the model takes its parts out by their places
in the whole.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

_TEXT = CPInput(0, 2, sequence="text")
_PACKED = CPInput(0, 2, sequence="packed")

PLANS: dict[str, Plan] = {
    "Cosmos3OmniTransformer": {
        "layers.0": {ParamId("und_seq"): _TEXT, ParamId("gen_seq"): _PACKED},
        # cos and sin of the text, then of all else.
        "layers.*": {ParamId("rotary_emb"): [_TEXT, _TEXT, _PACKED, _PACKED]},
        "layers.*.self_attn": CPAttention(("packed",), prefix="text"),
        "norm_moe_gen": CPOutput(0, 2, sequence="packed"),
    },
}
