"""Wan 2.1 and 2.2 from an image: the first frame of each video is given to the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..loss import Level
from .wan import Wan


class WanImageToVideo(Wan):
    """`WanImageToVideoPipeline` with one or two `WanTransformer3DModel`.

    Most models get the frame as further channels, and Wan 2.1 also an embedding of it. Wan2.2-TI2V-5B gets it in place
    of the first noisy latent frame, at timestep 0.
    """

    pipelines = ("WanImageToVideoPipeline",)
    # The last two attend to the embedding of the image. Models without one have no such layers.
    lora_targets = (*Wan.lora_targets, "add_k_proj", "add_v_proj")
    provided_inputs: ClassVar[tuple[str, ...]] = ("image_dim", "added_kv_proj_dim")
    takes_image = True
    conditioned = True

    @property
    def replaces_frame(self) -> bool:
        """Whether the given frame replaces the first noisy latent frame."""
        return bool(self.pipeline.config.expand_timesteps)

    @property
    def input_channels(self) -> int | None:
        latents = self.pipeline.vae.config.z_dim
        # The given frame, and a mask of the frames of pixels that a latent frame stands for.
        return latents if self.replaces_frame else 2 * latents + self.pipeline.vae_scale_factor_temporal

    @property
    def encoders(self) -> dict[str, nn.Module]:
        image_encoder = self.pipeline.image_encoder
        return super().encoders | ({} if image_encoder is None else {"image_encoder": image_encoder})

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        if pixels.shape[2] == 1:
            raise TrainingError(
                f"{type(self.pipeline).__name__} is given the first frame, so nothing is left to train on an image or "
                f"a video of one frame. Give --num_frames from {sum(self.frame_rule)}, and data without images."
            )
        found = super().encode(pixels)
        first = pixels[:, :, 0]
        with torch.no_grad():
            found["image_condition"] = torch.cat([self._condition(each[None], pixels.shape) for each in first])
            if self.config.image_dim is not None:
                images = list(((first + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
                embeds = self.pipeline.encode_image(images, device=self.pipeline.image_encoder.device)
                found["image_embeds"] = embeds.float().cpu()
        return found

    def _condition(self, image: Tensor, shape: torch.Size) -> Tensor:
        """What the pipeline makes of an image [1, 3, height, width] for a video of pixels of `shape`."""
        pipeline, (frames, height, width) = self.pipeline, shape[-3:]
        unused = torch.zeros(1)
        _, condition, *_ = pipeline.prepare_latents(
            image, 1, pipeline.vae.config.z_dim, height, width, frames, torch.float32, torch.device("cpu"), None, unused
        )
        return condition.cpu()

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        condition = text["image_condition"].to(noisy.dtype)
        if self.replaces_frame:
            inputs = super().inputs(torch.cat([condition, noisy[:, :, 1:]], dim=2), timestep, text)
            inputs["timestep"] = inputs["timestep"].clone()
            inputs["timestep"][:, : self.tokens((1, *noisy.shape[-2:]))] = 0
        else:
            inputs = super().inputs(torch.cat([noisy, condition], dim=1), timestep, text)
        return {**inputs, "encoder_hidden_states_image": text.get("image_embeds")}

    def loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        if not self.replaces_frame:
            return super().loss(prediction, clean, noise, level, mask)
        # The sampler discards what is predicted for the given frame.
        prediction, clean, noise = (each[:, :, 1:] for each in (prediction, clean, noise))
        return super().loss(prediction, clean, noise, level, mask)
