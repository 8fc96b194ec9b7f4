"""CogView4: pictures; text as long as it is, in steps of 16; told the size, and the noise level before its shift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..loss import Objective, RectifiedFlow, dynamic_shift, scheduler_shift
from .base import Family

TEXT_STEP = 16


class CogView4(Family):
    """`CogView4Pipeline` with a `CogView4Transformer2DModel`."""

    kind = "image"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 1024
    pipelines = ("CogView4Pipeline",)

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        self.padded_length: int | None = None
        """tokens to which all captions are padded, once they are known."""

    def make_objective(self) -> Objective:
        # The pipeline gives its scheduler timesteps of its own, which stay as they are when the noise levels shift.
        fixed, config = self.shift, self.pipeline.scheduler.config
        if fixed is not None:
            return RectifiedFlow(lambda tokens: fixed, shifted_timestep=False)
        if not config.get("use_dynamic_shifting", False):
            return RectifiedFlow(scheduler_shift(config), shifted_timestep=False)
        base_tokens = config.get("base_image_seq_len", 256)
        base, most = config.get("base_shift", 0.25), config.get("max_shift", 0.75)

        def mu(tokens: int) -> float:
            return base + most * math.sqrt(tokens / base_tokens)

        return RectifiedFlow(dynamic_shift(mu, config.get("time_shift_type", "exponential")), shifted_timestep=False)

    @property
    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.config.patch_size

    def prepare_captions(self, captions: Sequence[str]) -> None:
        """Settles the length to which all are padded: the longest's, as the pipeline does within a batch. The model has
        no mask for padding, so that its own way of padding is part of what it was trained with."""
        longest = max((self._length(caption) for caption in {*captions, ""}), default=0)
        self.padded_length = -(-longest // TEXT_STEP) * TEXT_STEP

    @property
    def text_tokens(self) -> int:
        return self.padded_length or self.max_sequence_length

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        if self.padded_length is None:
            raise TrainingError("CogView4 pads captions to one length: call prepare_captions with all of them first.")
        return {"prompt_embeds": self._embeds(captions, self.padded_length)}

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        # Each padded by itself, as the pipeline would.
        prompts = {"prompt_embeds": prompt, **({"negative_prompt_embeds": negative_prompt or ""} if guided else {})}
        return {
            name: self._embeds([each], -(-self._length(each) // TEXT_STEP) * TEXT_STEP)
            for name, each in prompts.items()
        }

    def _length(self, caption: str) -> int:
        return min(len(self.pipeline.tokenizer(caption).input_ids), self.max_sequence_length)

    def _embeds(self, captions: list[str], length: int) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids = tokenizer(
            captions,
            padding="max_length",
            max_length=max(length, TEXT_STEP),
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            return encoder(ids.to(encoder.device), output_hidden_states=True).hidden_states[-2].cpu()

    def to_vae(self, pixels: Tensor) -> Tensor:
        return pixels.squeeze(2)

    def from_vae(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipeline.vae.config.scaling_factor

    def tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // self.config.patch_size) * (shape[-1] // self.config.patch_size)

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        batch, _, _, height, width = noisy.shape
        factor = self.pipeline.vae_scale_factor
        size = noisy.new_tensor([[height * factor, width * factor]]).expand(batch, 2)
        return {
            "hidden_states": noisy.squeeze(2),
            "encoder_hidden_states": text["prompt_embeds"],
            "timestep": timestep,
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.unsqueeze(2)
