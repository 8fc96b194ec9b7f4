"""Wan VACE: videos from a control video, a mask of the parts that it leaves open, and reference images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.conditions import MOST, Wanted
from ..errors import TrainingError
from .wan import Wan


class WanVACE(Wan):
    """`WanVACEPipeline` with one or two `WanVACETransformer3DModel`.

    Reference images become latent frames before those of the video, in the model's input as well as in what it learns:
    the sampler draws them, too, and discards them at the end.
    """

    pipelines = ("WanVACEPipeline",)
    provided_inputs: ClassVar[tuple[str, ...]] = ("vace_layers",)
    example_conditions: ClassVar[Mapping[str, Wanted]] = {
        "control": Wanted(instead=("references",)),
        "control_mask": Wanted(needed=False),
        "references": Wanted(most=MOST, needed=False),
    }
    references_have_borders = True
    conditioned = True
    image_argument = "reference_images"
    control_arguments: ClassVar[Mapping[str, str]] = {"control": "video", "control_mask": "mask"}

    def check(self) -> None:
        latents, pixels = self.pipeline.vae.config.z_dim, self.pipeline.vae_scale_factor_spatial**2
        expected, given = self.config.vace_in_channels, 2 * latents + pixels
        if expected != given:
            raise TrainingError(
                f"this {type(self.transformer).__name__} has {expected} channels for the control, but the pipeline "
                f"makes {given}: twice those of the VAE's latents, and a mask of {pixels}. Give a model with these."
            )

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        found = super().encode(pixels)
        # Without a control, everything is open.
        control = given.get("control", torch.zeros_like(pixels))
        mask = ((given.get("control_mask", torch.ones_like(pixels)) + 1) / 2).clamp(0, 1)
        references = given.get("references", pixels.new_zeros(len(pixels), 0, 3, *pixels.shape[-2:]))
        for one in references.unbind(1):
            picture = super().encode(one[:, :, None])
            found = {name: torch.cat([picture[name], each], dim=2) for name, each in found.items()}
        examples = zip(control.split(1), mask.split(1), references, strict=True)
        return {**found, "control": torch.cat([self._control(*each) for each in examples])}

    def _control(self, control: Tensor, mask: Tensor, references: Tensor) -> Tensor:
        """What the pipeline makes of the conditions of one example: latents of the control's kept and open parts, and
        the mask, [1, channels, frames, height, width]."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        pictures = [[each.to(vae.device) for each in references]]
        control, mask = control.to(vae.device), mask.to(vae.device).contiguous()
        with torch.no_grad():
            latents = pipeline.prepare_video_latents(control, mask, pictures, None, vae.device)
        masks = pipeline.prepare_masks(mask, pictures)
        return torch.cat([latents, masks], dim=1).float().cpu()

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        control = text["control"].to(noisy.dtype)
        scale = control.new_ones(len(self.config.vace_layers))
        inputs = super().inputs(noisy, timestep, text)
        return {**inputs, "control_hidden_states": control, "control_hidden_states_scale": scale}
