"""What differs from model to model in training, a file for each family, found by the class of the transformer."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import TrainingError
from .base import Family

FAMILIES = {
    "CogVideoXTransformer3DModel": "cogvideox:CogVideoX",
    "CogView4Transformer2DModel": "cogview4:CogView4",
    "FluxTransformer2DModel": "flux:Flux",
    "WanTransformer3DModel": "wan:Wan",
}
"""class of the transformer: module and class of its family."""

_registered: dict[str, type[Family]] = {}


def register_family(transformer: str, family: type[Family]) -> None:
    """Trains models whose transformer has the class name `transformer` as `family` says; the last one counts."""
    _registered[transformer] = family


def family_of(pipeline: Any, **options: Any) -> Family:
    """The family of a pipeline, made with `options` (see `Family`).

    Raises:
        TrainingError: none is known for its transformer.
    """
    name = type(getattr(pipeline, "transformer", None)).__name__
    if name in _registered:
        return _registered[name](pipeline, **options)
    if name not in FAMILIES:
        raise TrainingError(
            f"{type(pipeline).__name__} has a transformer of class {name}, and training is known for "
            f"{', '.join(sorted({**FAMILIES, **_registered}))}. Write a `Family` for it "
            "(diffusers_attn.training.families.base) and register it: register_family."
        )
    module, _, cls = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), cls)(pipeline, **options)


__all__ = ["FAMILIES", "Family", "family_of", "register_family"]
