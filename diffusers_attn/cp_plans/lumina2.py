"""Lumina 2: text and image in one sequence, each refined by itself before.

The text's refiner runs whole on all ranks; the image's is split, and gathered before the model puts the two together,
sample by sample, without the text's padding. From there on it is one sequence, of which the model cuts out the image by
its place in the whole. The mask is of all keys.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "Lumina2Transformer2DModel": {
        "context_refiner.*.attn": CPAttention(query=()),
        "noise_refiner.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="image")},
        "noise_refiner.*": {ParamId("image_rotary_emb"): CPInput(1, 3, sequence="image")},
        "noise_refiner.*.attn": CPAttention(("image",)),
        "noise_refiner.-1": CPOutput(1, 3, sequence="image"),
        "layers.0": {ParamId("hidden_states"): CPInput(1, 3, sequence="joint")},
        "layers.*": {ParamId("image_rotary_emb"): CPInput(1, 3, sequence="joint")},
        "layers.*.attn": CPAttention(("joint",), key_mask=True),
        "norm_out": CPOutput(1, 3, sequence="joint"),
    },
}
