"""Model families: the parts of training that differ between models, one file per family.

A family is found by the class of the pipeline's transformer.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import TrainingError
from .base import Family

FAMILIES = {
    "CogVideoXTransformer3DModel": "cogvideox:CogVideoX",
    "CogView4Transformer2DModel": "cogview4:CogView4",
    "Flux2Transformer2DModel": "flux2:Flux2",
    "FluxTransformer2DModel": "flux:Flux",
    "QwenImageTransformer2DModel": "qwen_image:QwenImage",
    "WanTransformer3DModel": "wan:Wan",
    "ZImageTransformer2DModel": "z_image:ZImage",
}
"""Module and class of the family for each class name of a transformer."""

registered: dict[str, type[Family]] = {}


def register_family(transformer: str, family: type[Family]) -> None:
    """Registers a family for pipelines whose transformer has the class name `transformer`. Replaces an earlier one."""
    registered[transformer] = family


def family_of(pipeline: Any, **options: Any) -> Family:
    """Creates the family of a pipeline.

    Args:
        pipeline: a diffusers pipeline.
        options: arguments of `Family`.

    Raises:
        TrainingError: no family is known for the transformer, the family does not support this pipeline, or the
            transformer needs inputs that the family does not provide.
    """
    transformer = type(getattr(pipeline, "transformer", None)).__name__
    return family_class(type(pipeline), transformer)(pipeline, **options)


def family_class(pipeline: type, transformer: str) -> type[Family]:
    """The family for a pipeline class and the class name of its transformer.

    Raises:
        TrainingError: no family is known for the transformer, or the family does not support this pipeline.
    """
    if transformer not in registered and transformer not in FAMILIES:
        raise TrainingError(
            f"{pipeline.__name__} has a transformer of class {transformer}. Training supports "
            f"{', '.join(sorted({**FAMILIES, **registered}))}. For another one, write a `Family` "
            "(diffusers_attn.training.families.base) and register it with register_family."
        )
    family = _family(transformer)
    if family.pipelines and not {each.__name__ for each in pipeline.__mro__}.intersection(family.pipelines):
        supported = sorted(name for each in {**FAMILIES, **registered} for name in _family(each).pipelines)
        raise TrainingError(
            f"--model is a {pipeline.__name__}. With a transformer of class {transformer}, training supports only "
            f"{' and '.join(family.pipelines)}, since other pipelines give it other inputs. Supported pipelines: "
            f"{', '.join(supported)}. Give a model of one of these, or write a `Family` whose `pipelines` names "
            f"{pipeline.__name__} and register it with register_family."
        )
    return family


def _family(transformer: str) -> type[Family]:
    if transformer in registered:
        return registered[transformer]
    module, _, cls = FAMILIES[transformer].partition(":")
    found: type[Family] = getattr(importlib.import_module(f".{module}", __name__), cls)
    return found


__all__ = ["FAMILIES", "Family", "family_class", "family_of", "register_family"]
