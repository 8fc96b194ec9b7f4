"""Caches of diffusers, which compute some steps, or parts of them, from earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from ...guidance import families
from ..feature import Feature, lossy

STEPS = 6


def _draw(pipe: Any) -> list[Tensor]:
    """Two runs, and a third whose guidance stops halfway."""

    def stop(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS // 2:
            pipe._guidance_scale = 1.0
        return {}

    calls: tuple[dict[str, Any], ...] = ({}, {"seed": 1}, {"callback_on_step_end": stop})
    return [families.draw(pipe, "wan", steps=STEPS, **call) for call in calls]


def _cache(make: Callable[[Any], Any]) -> Feature:
    return lossy(lambda pipe: pipe.transformer.enable_cache(make(pipe)), draw=_draw, not_under=("vae",))


def _timestep(pipe: Any) -> Callable[[], int]:
    return lambda: pipe.current_timestep


FEATURES = {
    "FirstBlockCache": _cache(lambda _: diffusers.FirstBlockCacheConfig(threshold=0.5)),
    "MagCache": _cache(
        lambda _: diffusers.MagCacheConfig(
            mag_ratios=torch.tensor([1.0] * STEPS), num_inference_steps=STEPS, threshold=1.0, retention_ratio=0.2
        )
    ),
    "TaylorSeer": _cache(
        lambda _: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d\.attn1"],
            taylor_factors_dtype=torch.float64,
        )
    ),
    "Pyramid Attention Broadcast": _cache(
        lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
            current_timestep_callback=_timestep(pipe),
        )
    ),
    "FasterCache": _cache(
        lambda pipe: diffusers.FasterCacheConfig(
            is_guidance_distilled=True, current_timestep_callback=_timestep(pipe), tensor_format="BCFHW"
        )
    ),
    "SeaCache": _cache(lambda _: diffusers.SeaCacheConfig(threshold=0.3)),
}  # fmt: skip
NOT_RUN = {
    "TextKVCache": "only NucleusMoE takes it, whose transformer alone is compared in "
    "`tests/context_parallel/hooks/test_caches.py`"
}
