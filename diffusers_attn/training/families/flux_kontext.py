"""FLUX.1 Kontext: FLUX.1 with a reference image, whose tokens follow those of the noisy image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.conditions import Wanted
from .flux import Flux
from .latents import patches


class FluxReference(Flux):
    """FLUX.1 with the latents of its condition, an image of the size of the trained one, as "reference"."""

    conditioned = True
    takes_image = True
    example_conditions: ClassVar[Mapping[str, Wanted]] = {"references": Wanted()}

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        found = super().encode(pixels)
        if given:
            picture = given["references"][:, 0] if "references" in given else given["control"][:, :, 0]
            vae = self.pipeline.vae
            with torch.no_grad():
                reference = vae.encode(picture.to(vae.device, vae.dtype)).latent_dist.mode()
            found["reference"] = self.normalise(self.from_vae(reference.float().cpu()))
        return found


class FluxKontext(FluxReference):
    """`FluxKontextPipeline` with a `FluxTransformer2DModel`. The reference has the size of the trained image."""

    pipelines = ("FluxKontextPipeline",)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        inputs = super().inputs(noisy, timestep, text)
        reference = text["reference"].to(noisy.dtype)
        coordinates = self.coordinates(reference).clone()
        coordinates[:, 0] = 1
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], self.pack(reference)], dim=1),
            "img_ids": torch.cat([inputs["img_ids"], coordinates]),
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return super().prediction(output[:, : patches(shape, 2)], shape)

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        # Otherwise the pipeline draws at about a million pixels, and scales the reference to a size of its own list.
        return {**super().size_arguments(frames, height, width), "max_area": height * width, "_auto_resize": False}
