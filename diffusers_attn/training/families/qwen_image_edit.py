"""Qwen-Image-Edit: Qwen-Image with reference images, which the transformer gets as further tokens, and the text encoder
as pictures beside the caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image
from torch import Tensor

from ..data.conditions import Wanted
from ..errors import TrainingError
from ..settings.flag_names import option
from .latents import patches
from .qwen_image import QwenImage


class QwenImageEdit(QwenImage):
    """`QwenImageEditPipeline` with a `QwenImageTransformer2DModel`. References have the size that the pipeline gives
    them, about a million pixels, whatever the size of the trained image."""

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline",)
    conditioned = True
    takes_image = True
    text_has_pictures = True
    example_conditions: ClassVar[Mapping[str, Wanted]] = {"references": Wanted()}

    def _text_length(self, wanted: int | None) -> int:
        if wanted is not None:
            raise TrainingError(
                f"{option('max_sequence_length', wanted)}: this pipeline encodes captions with images at any length. "
                "Leave it out."
            )
        return int(self.pipeline.tokenizer_max_length)

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, width / height)
        return height, width

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        found = super().encode(pixels)
        if "references" in given:
            vae = self.pipeline.vae
            with torch.no_grad():
                each = [vae.encode(one[:, :, None].to(vae.device, vae.dtype)) for one in given["references"].unbind(1)]
            latents = [self.normalise(one.latent_dist.mode().float().cpu()) for one in each]
            found["references"] = torch.stack(latents, dim=1)
        return found

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        assert self.seen is not None  # `text_has_pictures`
        with torch.no_grad():
            rows = [
                self.pipeline.encode_prompt([caption], image=self.pictures(images), device=self.text_device)[0].cpu()
                for caption, images in zip(captions, self.seen, strict=True)
            ]
        return {"prompt_embeds": torch.cat(rows)}

    def pictures(self, references: Tensor) -> Any:
        """The text encoder's pictures for reference images [number, 3, height, width]."""
        [found] = _as_pil(references)
        return found

    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        inputs = super().inputs(noisy, timestep, text)
        references = text["references"].to(noisy.dtype).unbind(1)
        batch, channels, _, height, width = references[0].shape
        tokens = [self.pipeline._pack_latents(each, batch, channels, height, width) for each in references]
        shapes = [(1, height // 2, width // 2)] * len(references)
        return {
            **inputs,
            "hidden_states": torch.cat([inputs["hidden_states"], *tokens], dim=1),
            "img_shapes": [[*each, *shapes] for each in inputs["img_shapes"]],
        }

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return super().prediction(output[:, : patches(shape, 2)], shape)


class QwenImageEditPlus(QwenImageEdit):
    """`QwenImageEditPlusPipeline`, of Qwen-Image-Edit-2509 and later ones: up to three references, which the text
    encoder sees smaller."""

    pipelines = ("QwenImageEditPlusPipeline",)
    example_conditions = {"references": Wanted(most=3)}

    def pictures(self, references: Tensor) -> Any:
        height, width = references.shape[-2:]
        width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, width / height)
        return [self.pipeline.image_processor.resize(each, height, width) for each in _as_pil(references)]


def _as_pil(images: Tensor) -> list[Image.Image]:
    """Images in [-1, 1], [number, 3, height, width], as PIL images."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
    return [Image.fromarray(each.numpy()) for each in pixels.cpu()]
