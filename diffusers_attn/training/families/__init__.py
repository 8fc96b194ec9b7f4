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

registered: dict[str, type[Family]] = {}


def register_family(transformer: str, family: type[Family]) -> None:
    """Trains models whose transformer has the class name `transformer` as `family` says; the last one counts."""
    registered[transformer] = family


def family_of(pipeline: Any, **options: Any) -> Family:
    """The family of a pipeline, made with `options` (see `Family`).

    Raises:
        TrainingError: none is known for its transformer, it does not serve this pipeline, or the transformer expects
            something else than the family feeds it.
    """
    transformer = type(getattr(pipeline, "transformer", None)).__name__
    return family_class(type(pipeline), transformer)(pipeline, **options)


def family_class(pipeline: type, transformer: str) -> type[Family]:
    """The family for pipelines of a class whose transformer has the class name `transformer`.

    Raises:
        TrainingError: none is known for this transformer, or it does not serve this pipeline.
    """
    if transformer not in registered and transformer not in FAMILIES:
        raise TrainingError(
            f"{pipeline.__name__} has a transformer of class {transformer}, and training is known for "
            f"{', '.join(sorted({**FAMILIES, **registered}))}. Write a `Family` for it "
            "(diffusers_attn.training.families.base) and register it: register_family."
        )
    family = _family(transformer)
    if family.pipelines and not {each.__name__ for each in pipeline.__mro__}.intersection(family.pipelines):
        served = sorted(name for each in {**FAMILIES, **registered} for name in _family(each).pipelines)
        raise TrainingError(
            f"--model is a {pipeline.__name__}. With a transformer of class {transformer}, training serves "
            f"{' and '.join(family.pipelines)} only: other pipelines feed it something else, or draw otherwise. "
            f"Pipelines that are served: {', '.join(served)}. Give a model of one of these, or write a `Family` whose "
            f"`pipelines` names {pipeline.__name__} and register it: register_family."
        )
    return family


def _family(transformer: str) -> type[Family]:
    if transformer in registered:
        return registered[transformer]
    module, _, cls = FAMILIES[transformer].partition(":")
    found: type[Family] = getattr(importlib.import_module(f".{module}", __name__), cls)
    return found


__all__ = ["FAMILIES", "Family", "family_class", "family_of", "register_family"]
