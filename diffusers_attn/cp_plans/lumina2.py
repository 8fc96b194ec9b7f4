"""Lumina 2: text and image are one sequence; each is refined separately before.

The text is refined while it is replicated. The image is refined while it is split, then gathered before the model joins
the two, sample by sample, without the text's padding. From there on they are one sequence, from which the model cuts
the image by its position. The mask covers all keys.
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
