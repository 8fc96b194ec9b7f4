"""Bria Fibo 2: the text's summary and the image in one sequence; some blocks also attend to the text: local.

The summary is made whole on all ranks; the image, with images to edit behind it, is refined by itself, split, and
gathered before the two are put together, in an order that depends on padding. From there on it is one sequence, of
which the model cuts out the image by its place in the whole. The mask is of all keys.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "BriaFibo2Transformer2DModel": {
        "noise_refiner.0": {ParamId("x"): CPInput(1, 3, sequence="image")},
        "noise_refiner.*": {
            ParamId("freqs_cis"): CPInput(1, 3, sequence="image"),
            # Which tokens are noise, and modulated by the time.
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
