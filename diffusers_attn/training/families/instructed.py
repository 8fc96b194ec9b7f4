"""Families whose pipeline puts an instruction before prompts, but not before negative prompts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .base import Family


class InstructedFamily(Family):
    """Encodes the empty caption, which replaces dropped captions, as the pipeline encodes an empty negative prompt."""

    encoded = ("prompt_embeds", "prompt_attention_mask")

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        encode = super().encode_text
        rows = [encode([each]) if each else self.encode_negative("") for each in captions]
        return {name: torch.cat([each[name] for each in rows]) for name in self.encoded}

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        with torch.no_grad():
            _, _, *negative = self.pipeline.encode_prompt(
                [""],
                do_classifier_free_guidance=True,
                negative_prompt=[prompt],
                max_sequence_length=self.max_sequence_length,
                device=self.text_device,
            )
        return {name: each.cpu() for name, each in zip(self.encoded, negative)}

    def default_of_call(self, name: str) -> Any:
        """Default value of an argument of the pipeline's call."""
        return inspect.signature(self.pipeline.__call__).parameters[name].default
