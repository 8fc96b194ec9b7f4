"""Guiders of modular pipelines: each combines the outputs of several calls of the transformer in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import guiders
from torch import Tensor

from ...guidance import test_modular
from ..feature import Feature

STEPS = 3


def _draw(pipe: Any) -> list[Tensor]:
    torch.manual_seed(0)  # of dropout
    with torch.no_grad():
        return [
            pipe(
                prompt="a cat", negative_prompt="bad", height=48, width=32, num_frames=5, num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0), output_type="pt", output="videos",
            )
        ]  # fmt: skip


def _plain(pipe: Any) -> list[Tensor]:
    pipe.update_components(guider=guiders.ClassifierFreeGuidance(guidance_scale=2.0))
    return _draw(pipe)


def _guider(make: Callable[[], Any], **options: Any) -> Feature:
    return Feature(
        lambda pipe: pipe.update_components(guider=make()),
        build=lambda: test_modular.build("classifier-free"),
        draw=_draw,
        plain=_plain,
        orders=("before",),
        not_under=("vae", "whole", "blocks over ranks"),
        tolerance=1e-3,
        **options,
    )


def _skip(**options: Any) -> diffusers.LayerSkipConfig:
    return diffusers.LayerSkipConfig([0], fqn="blocks", **options)


FEATURES = {
    "classifier-free": _guider(lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0)),
    "classifier-free, zero star": _guider(lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0)),
    "tangential": _guider(lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0)),
    "adaptive projected": _guider(lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=5.0)),
    "adaptive projected, mixed": _guider(lambda: guiders.AdaptiveProjectedMixGuidance(guidance_scale=5.0)),
    "skip-layer": _guider(
        lambda: guiders.SkipLayerGuidance(5.0, skip_layer_guidance_stop=1.0, skip_layer_config=_skip())
    ),
    "smoothed energy": _guider(
        lambda: guiders.SmoothedEnergyGuidance(
            5.0, seg_guidance_config=diffusers.SmoothedEnergyGuidanceConfig([0], fqn="blocks")
        )
    ),
    "auto-guidance, a layer skipped": _guider(lambda: guiders.AutoGuidance(5.0, auto_guidance_config=_skip())),
    "auto-guidance, dropout": _guider(lambda: guiders.AutoGuidance(5.0, auto_guidance_config=_skip(dropout=0.5))),
}  # fmt: skip
NOT_RUN = {
    "magnitude-aware": "diffusers' code fails on the latents of videos",
    "perturbed attention": "diffusers does not accept it for the attention of Wan",
    "frequency-decoupled": "it needs kornia, which the tests do not install",
}
