"""Z-Image: image and text are one sequence; each is refined separately before.

The text is refined while it is replicated. The image is refined while it is split, then gathered before the model joins
the two, sample by sample, and pads the samples to one length. From there on they are one sequence, from which the model
cuts the image by its position. Masks cover all keys.

With reference images (lists of images and `image_noise_mask`), the sequence is text, images, and SigLIP's embedding of
them, which is refined while it is replicated. Each token then has a flag whether it is noise.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "ZImageTransformer2DModel": {
        # By number of the layer after which they are added.
        "": {ParamId("controlnet_block_samples"): CPInput(1, 3, sequence="joint")},
        "noise_refiner.0": {ParamId("x"): CPInput(1, 3, sequence="image")},
        "noise_refiner.*": {
            ParamId("freqs_cis"): CPInput(1, 3, sequence="image"),
            ParamId("noise_mask"): CPInput(1, 2, sequence="image"),
        },
        "noise_refiner.*.attention": CPAttention(("image",), key_mask=True),
        "noise_refiner.-1": CPOutput(1, 3, sequence="image"),
        "context_refiner.*.attention": CPAttention(query=()),
        "siglip_refiner?.*.attention": CPAttention(query=()),
        "layers.0": {ParamId("x"): CPInput(1, 3, sequence="joint")},
        "layers.*": {
            ParamId("freqs_cis"): CPInput(1, 3, sequence="joint"),
            ParamId("noise_mask"): CPInput(1, 2, sequence="joint"),
        },
        "layers.*.attention": CPAttention(("joint",), key_mask=True),
        "all_final_layer.*": [
            {ParamId("noise_mask"): CPInput(1, 2, sequence="joint")},
            CPOutput(1, 3, sequence="joint"),
        ],
    },
}
