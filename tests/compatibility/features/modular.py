"""Modular pipelines of diffusers, whose blocks users put together. Those of Wan are in `guiders`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ... import tiny_pipelines
from ..feature import Feature


def _pipeline(blocks: str, parts: str, not_under: tuple[str, ...] = (), **call: Any) -> Feature:
    def build() -> Any:
        pipe = getattr(diffusers, blocks)().init_pipeline()
        found = tiny_pipelines.make(parts).components
        taken = {each.name for each in pipe.blocks.expected_components}
        pipe.update_components(**{name: each for name, each in found.items() if name in taken})
        if "guider" in taken:
            pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(pipe: Any) -> list[Tensor]:
        with torch.no_grad():
            return [
                pipe(prompt="a cat", height=64, width=48, num_inference_steps=3, output="latents",
                     generator=torch.Generator().manual_seed(seed), **call)
                for seed in (0, 1)
            ]  # fmt: skip

    return Feature(build=build, draw=draw, orders=("before",), not_under=("vae", "whole", *not_under), tolerance=1e-3)


QWEN = _pipeline("QwenImageAutoBlocks", "qwen_image", negative_prompt="bad")
FEATURES = {
    "Qwen-Image, modular": QWEN,
    "Z-Image, modular": _pipeline("ZImageAutoBlocks", "z_image", negative_prompt="bad"),
    "FLUX.2 klein, modular": _pipeline(
        "Flux2KleinAutoBlocks",
        "flux2",
        ("guidance", "weights"),  # the distilled model has no guidance, and the small one no repeated blocks
    ),
}
