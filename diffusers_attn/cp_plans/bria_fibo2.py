"""Bria Fibo 2: the text's summary and the image are one sequence; cross-attention to the text in some blocks is local.

The summary is replicated. The image, followed by images to edit, is refined separately and split, then gathered before
the two are joined in an order that depends on padding. From there on they are one sequence, from which the model cuts
the image by its position. The mask covers all keys.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "BriaFibo2Transformer2DModel": {
        "noise_refiner.0": {ParamId("x"): CPInput(1, 3, sequence="image")},
        "noise_refiner.*": {
            ParamId("freqs_cis"): CPInput(1, 3, sequence="image"),
            # Marks the tokens that are noise, which are modulated by the time.
            ParamId("noise_mask"): CPInput(1, 2, sequence="image"),
        },
        "noise_refiner.*.attention": CPAttention(("image",)),
        "noise_refiner.-1": CPOutput(1, 3, sequence="image"),
        "perceiver.layers.*.cross_attention": CPAttention(query=()),
        "perceiver.layers.*.self_attention": CPAttention(query=()),
        "layers.0": {ParamId("x"): CPInput(1, 3, sequence="joint")},
        "layers.*": {
            ParamId("freqs_cis"): CPInput(1, 3, sequence="joint"),
            ParamId("noise_mask"): CPInput(1, 2, sequence="joint"),
        },
        "layers.*.attention": CPAttention(("joint",), key_mask=True),
        "layers.*.cross_attention?": CPAttention(("joint",), key=()),
        "layers.-1": CPOutput(1, 3, sequence="joint"),
    },
}
