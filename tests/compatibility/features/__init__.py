"""The features by name, and by kind as the page lists them."""

from ..feature import Feature
from . import adapters, caches, compiling, conditions, copies, guiders, life, modular, needs_gpu, offloading, precision

KINDS: dict[str, dict[str, Feature]] = {
    "Step caches": caches.FEATURES,
    "Compilation": compiling.FEATURES,
    "Offloading": offloading.FEATURES,
    "Adapters": adapters.FEATURES,
    "Precision": precision.FEATURES,
    "Conditions": conditions.FEATURES,
    "Modular pipelines": modular.FEATURES,
    "Guiders, in the modular pipeline of Wan": guiders.FEATURES,
    "Copies and files": copies.FEATURES,
    "Life of a pipeline": life.FEATURES,
    "What needs a GPU": needs_gpu.FEATURES,
}
FEATURES: dict[str, Feature] = {name: feature for kind in KINDS.values() for name, feature in kind.items()}
NOT_RUN: dict[str, dict[str, str]] = {
    "Step caches": caches.NOT_RUN,
    "Precision": precision.NOT_RUN,
    "Guiders, in the modular pipeline of Wan": guiders.NOT_RUN,
    "Life of a pipeline": life.NOT_RUN,
}
"""What the kinds have besides, with the reason why no test runs it."""
