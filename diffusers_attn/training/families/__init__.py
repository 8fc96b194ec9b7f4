"""Model families: the parts of training that differ between models, one file per family.

`base` has the interface, `Family`; `accepted` checks the inputs of a model, `latents` has the kinds of latents, and
`denoising` the loss. `images`, `hunyuan` and `instructed` have what several families share. A family is found by the
classes of the pipeline and of its transformer.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import TrainingError
from .base import Family

FAMILIES: dict[str, tuple[str, ...]] = {
    "ChromaTransformer2DModel": ("chroma:Chroma",),
    "CogVideoXTransformer3DModel": ("cogvideox:CogVideoX",),
    "CogView4Transformer2DModel": ("cogview4:CogView4",),
    "Flux2Transformer2DModel": ("flux2:Flux2",),
    "FluxTransformer2DModel": ("flux:Flux", "flux_kontext:FluxKontext", "flux_control:FluxControl"),
    "HunyuanVideo15Transformer3DModel": ("hunyuan_video15:HunyuanVideo15",),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video:HunyuanVideo",),
    "Krea2Transformer2DModel": ("krea2:Krea2",),
    "LTX2VideoTransformer3DModel": ("ltx2:LTX2",),
    "LTXVideoTransformer3DModel": ("ltx:LTXVideo",),
    "Lumina2Transformer2DModel": ("lumina2:Lumina2",),
    "QwenImageTransformer2DModel": (
        "qwen_image:QwenImage",
        "qwen_image_edit:QwenImageEdit",
        "qwen_image_edit:QwenImageEditPlus",
    ),
    "SD3Transformer2DModel": ("sd3:SD3",),
    "SanaTransformer2DModel": ("sana:Sana",),
    "UNet2DConditionModel": ("sdxl:StableDiffusionXL",),
    "WanTransformer3DModel": ("wan:Wan", "wan_i2v:WanImageToVideo"),
    "WanVACETransformer3DModel": ("wan_vace:WanVACE",),
    "ZImageTransformer2DModel": ("z_image:ZImage",),
}
"""Module and class of each family for the class name of a transformer or UNet. Families of one class support different
pipelines."""

registered: dict[str, type[Family]] = {}


def register_family(transformer: str, family: type[Family]) -> None:
    """Registers a family for pipelines whose transformer has the class name `transformer`. It replaces the library's
    families of this transformer, and an earlier registered one."""
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
    transformer = type(getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)).__name__
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
    families = _families(transformer)
    names = {each.__name__ for each in pipeline.__mro__}
    for family in families:
        if not family.pipelines or names.intersection(family.pipelines):
            return family
    accepted = " and ".join(name for each in families for name in each.pipelines)
    supported = sorted(name for each in {**FAMILIES, **registered} for one in _families(each) for name in one.pipelines)
    raise TrainingError(
        f"--model is a {pipeline.__name__}. With a transformer of class {transformer}, training supports only "
        f"{accepted}, since other pipelines give it other inputs. Supported pipelines: {', '.join(supported)}. Give a "
        f"model of one of these, or write a `Family` whose `pipelines` names {pipeline.__name__} and register it with "
        "register_family."
    )


def _families(transformer: str) -> list[type[Family]]:
    if transformer in registered:
        return [registered[transformer]]
    found = []
    for name in FAMILIES[transformer]:
        module, _, cls = name.partition(":")
        found.append(getattr(importlib.import_module(f".{module}", __name__), cls))
    return found


__all__ = ["FAMILIES", "Family", "family_class", "family_of", "register_family"]
