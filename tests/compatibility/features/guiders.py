"""Guiders of modular pipelines: each combines the outputs of several calls of the transformer in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import guiders
from torch import Tensor

from ...guidance import test_modular
from ..feature import Feature
from .modular import QWEN

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


def _by_scale(scale: float) -> Callable[[Any], list[Tensor]]:
    def plain(pipe: Any) -> list[Tensor]:
        pipe.update_components(guider=guiders.ClassifierFreeGuidance(guidance_scale=scale))
        return _draw(pipe)

    return plain


def _guider(make: Callable[[], Any], unlike: float = 5.0) -> Feature:
    """
    Args:
        make: makes it, with a scale of 5.
        unlike: scale of classifier-free guidance, whose results must differ.
    """
    return Feature(
        lambda pipe: pipe.update_components(guider=make()),
        build=lambda: test_modular.build("classifier-free"),
        draw=_draw,
        plain=_by_scale(unlike),
        orders=("before",),
        not_under=("vae", "whole", "blocks over ranks"),
        tolerance=1e-3,
    )


def _skip(**options: Any) -> diffusers.LayerSkipConfig:
    return diffusers.LayerSkipConfig([0], fqn="blocks", **options)


def _of_images(make: Callable[[], Any]) -> Feature:
    """A guider that diffusers does not accept, or that fails, with Wan."""
    return dataclasses.replace(
        QWEN,
        put=lambda pipe: pipe.update_components(guider=make()),
        plain=QWEN.draw,
        not_under=("vae", "whole", "blocks over ranks"),
    )


FEATURES = {
    "classifier-free": _guider(lambda: guiders.ClassifierFreeGuidance(guidance_scale=5.0), unlike=2.0),
    "classifier-free, zero star": _guider(lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0)),
    "tangential": _guider(lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0)),
    "adaptive projected": _guider(
        lambda: guiders.AdaptiveProjectedGuidance(5.0, eta=0.0, adaptive_projected_guidance_momentum=-0.5)
    ),
    "adaptive projected, mixed": _guider(
        lambda: guiders.AdaptiveProjectedMixGuidance(5.0, adaptive_projected_guidance_start_step=0)
    ),
    "skip-layer": _guider(
        lambda: guiders.SkipLayerGuidance(5.0, skip_layer_guidance_stop=1.0, skip_layer_config=_skip())
    ),
    "auto-guidance, a layer skipped": _guider(lambda: guiders.AutoGuidance(5.0, auto_guidance_config=_skip())),
    "auto-guidance, dropout": _guider(lambda: guiders.AutoGuidance(5.0, auto_guidance_config=_skip(dropout=0.5))),
    "magnitude-aware, in that of Qwen-Image": _of_images(lambda: guiders.MagnitudeAwareGuidance(15.0)),
    "perturbed attention, in that of Qwen-Image": _of_images(
        lambda: guiders.PerturbedAttentionGuidance(
            5.0, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
            perturbed_guidance_config=diffusers.LayerSkipConfig(
                [0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
            ),
        )
    ),
}  # fmt: skip
NOT_RUN = {
    "smoothed energy": "diffusers 0.42.1 never applies it: `SmoothedEnergyGuidance.prepare_models` does not count its "
    "calls; its hook is compared in `tests/context_parallel/hooks/test_diffusers_hooks.py`",
    "frequency-decoupled": "diffusers' code fails on the latents of videos, and on the tokens of Qwen-Image",
}
