"""Z-Image: image and text in one sequence, each refined by itself before.

The text's refiner runs whole on all ranks; the image's is split, and gathered before the model puts the two together,
sample by sample, and pads the samples to one length. From there on it is one sequence, of which the model cuts out the
image by its place in the whole. Masks are of all keys.

With reference images (the model is given lists of images, with `image_noise_mask`) the sequence is text, images, and
what SigLIP made of them, which is refined whole as the text is; each token then says whether it is noise.
"""

from .plan import CPAttention, CPInput, CPOutput, ParamId, Plan

PLANS: dict[str, Plan] = {
    "ZImageTransformer2DModel": {
        # By number of the layer behind which they are added.
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
