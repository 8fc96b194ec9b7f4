"""Which models are compared under their plans, by family: data for `models.py`.

Each module has
    MODELS: name -> plan (None: the registered one). What is before a comma names a case of the zoo, and the whole, in
        VARIANTS, what is changed about it.
    VARIANTS: name -> (changes to the case's configuration, None or a function that changes its drawn inputs).
"""

from . import blocks, controlnets, image_joint, shipped, single, video

FAMILIES = {
    "shipped": shipped,
    "image_joint": image_joint,
    "video": video,
    "single": single,
    "controlnets": controlnets,
}
COMPARED = {**FAMILIES, "blocks": blocks}
"""Also those that are compared in a test of their own."""
VARIANTS = {name: changes for family in FAMILIES.values() for name, changes in family.VARIANTS.items()}
