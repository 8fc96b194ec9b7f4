"""What a family of models has to say about itself to be trained.

Latents are `[batch, channels, frames, height, width]` everywhere, of pictures with one frame; what a VAE and a
transformer want instead is their family's business.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..flag_names import option
from ..loss import Objective

FURTHER_INPUTS = {
    "image_dim": "the embedding of a picture",
    "added_kv_proj_dim": "the embedding of a picture",
    "pos_embed_seq_len": "the embeddings of pictures",
    "ofs_embed_dim": "an offset between frames",
    "vace_layers": "a control video",
    "guidance_embeds": "its guidance",
}
"""entries of a transformer's configuration: where one is set, what the forward takes besides latents, timestep and
text."""


class Family(abc.ABC):
    """One pipeline, as training sees it.

    Args:
        pipeline: of diffusers, with text encoders and VAE, as long as something is to be encoded.
        shift: in place of the scheduler's, a number; None takes the scheduler's. Only for rectified flow.
        guidance: what a model that was distilled from guidance is told; None is 1. Only for such models.
        max_sequence_length: tokens of text; None is the pipeline's own number.
    """

    kind: ClassVar[Literal["image", "video"]]
    lora_targets: ClassVar[tuple[str, ...]]
    """names of the layers that get adapters, where a user names none."""
    text_length: ClassVar[int]
    """tokens of text, where a user says nothing."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    fps: ClassVar[float] = 16.0
    """of drawn videos, where the data do not say it."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """names of the pipeline classes that are served, with those derived from them; none is all."""
    served_inputs: ClassVar[tuple[str, ...]] = ()
    """those of `FURTHER_INPUTS` that `inputs` gives where the transformer takes them."""
    refused_components: ClassVar[Mapping[str, str]] = {}
    """parts of a pipeline with which it cannot be trained, and why."""
    prediction_type: ClassVar[str] = "flow_prediction"
    """what the scheduler must take the model's output for, where its configuration says it."""
    packed: ClassVar[int] = 1
    """how many channels of a token come from one channel of the latents."""

    def __init__(
        self,
        pipeline: Any,
        *,
        shift: float | None = None,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.check_components({name: each is not None for name, each in pipeline.components.items()})
        self.shift = shift
        self._check_guidance(guidance)
        self.guidance = 1.0 if guidance is None else guidance
        self.max_sequence_length = self._text_length(max_sequence_length)
        self._check_inputs()
        self.check()
        self.objective = self.make_objective()

    def check(self) -> None:  # noqa: B027 (most have nothing to check)
        """Raises TrainingError where this pipeline or these settings cannot be trained."""

    @classmethod
    def check_components(cls, components: Mapping[str, bool]) -> None:
        """Raises TrainingError where a pipeline has one of `refused_components`.

        Args:
            components: names of a pipeline's parts, and whether it has them.
        """
        for name, why in cls.refused_components.items():
            if components.get(name):
                raise TrainingError(f"this pipeline has a {name}: {why}")

    def _check_inputs(self) -> None:
        """Compares what transformer and scheduler expect with what `inputs` and `make_objective` give them.

        Raises:
            TrainingError: other channels, a further input, or another kind of prediction.
        """
        model, config = type(self.pipeline.transformer).__name__, self.config
        takes, fed = config.get("in_channels"), self.fed_channels
        if takes is not None and fed is not None and takes != fed:
            raise TrainingError(
                f"this {model} takes {takes} channels, and training feeds it {fed}, those of the VAE's latents: it is "
                "made to be given something more, such as a picture, a mask or a control. Give a model that draws from "
                f"text{self._served()}."
            )
        for name, what in FURTHER_INPUTS.items():
            if config.get(name) and name not in self.served_inputs:
                raise TrainingError(
                    f"this {model} takes {what} (its {name} is {config[name]}), which training does not feed it. Give "
                    f"a model that draws from text{self._served()}."
                )
        predicts = self.pipeline.scheduler.config.get("prediction_type", self.prediction_type)
        if predicts != self.prediction_type:
            raise TrainingError(
                f"the scheduler's prediction_type is {predicts!r}, and {type(self).__name__} trains for "
                f"{self.prediction_type!r}. Give a model with such a scheduler."
            )

    def _text_length(self, wanted: int | None) -> int:
        limit = self.text_limit
        if wanted is None:
            return self.text_length if limit is None else min(self.text_length, limit)
        if limit is not None and wanted > limit:
            raise TrainingError(
                f"{option('max_sequence_length', wanted)}: this {type(self.pipeline.transformer).__name__} takes up to "
                f"{limit} tokens of text."
            )
        return wanted

    @property
    def text_limit(self) -> int | None:
        """The most tokens of text that the transformer takes; None where it takes any number."""
        limit: int | None = self.config.get("max_text_seq_length")
        return limit

    def _check_guidance(self, guidance: float | None) -> None:
        if guidance is not None and not (
            "guidance_embeds" in self.served_inputs and self.config.get("guidance_embeds")
        ):
            raise TrainingError(
                f"{option('guidance', guidance)}: this {type(self.pipeline.transformer).__name__} is not told any "
                "guidance, as only models are that were distilled from it, such as FLUX.1-dev. Leave it out."
            )

    def _served(self) -> str:
        return f": a {' or '.join(self.pipelines)}" if self.pipelines else ""

    @property
    def fed_channels(self) -> int | None:
        """Channels of what `inputs` gives the transformer; None where that cannot be said."""
        vae = getattr(self.pipeline, "vae", None)
        latents = None if vae is None else vae.config.get("latent_channels", vae.config.get("z_dim"))
        return None if latents is None else latents * self.packed

    @property
    def config(self) -> Any:
        """Of the transformer."""
        return self.pipeline.transformer.config

    @abc.abstractmethod
    def make_objective(self) -> Objective:
        """What the model predicts, with the shift of its sampler."""

    @property
    def text_device(self) -> torch.device:
        """Where captions are encoded. (A pipeline with models in several places does not know.)"""
        return self.pipeline.text_encoder.device

    # ---- Data

    @property
    @abc.abstractmethod
    def size_multiple(self) -> int:
        """What height and width in pixels must be multiples of."""

    @property
    def frame_rule(self) -> tuple[int, int]:
        """(multiple, remainder) that numbers of frames have; of pictures, one frame."""
        return 1, 0

    @abc.abstractmethod
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """What the transformer is told of each caption: tensors [captions, ...] by name, on the CPU."""

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """The distribution of latents of `pixels`, float [batch, 3, frames, height, width] in [-1, 1].

        Returns:
            "latents_mean" and "latents_logvar", float32 [batch, channels, frames, height, width], on the CPU, as the
            VAE has them: not scaled yet.
        """
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(self.to_vae(pixels.to(vae.device, vae.dtype))).latent_dist
        mean, logvar = (self.from_vae(each.float().cpu()) for each in (posterior.mean, posterior.logvar))
        return {"latents_mean": mean, "latents_logvar": logvar}

    def to_vae(self, pixels: Tensor) -> Tensor:
        """As the VAE takes them."""
        return pixels

    def from_vae(self, latents: Tensor) -> Tensor:
        """From the VAE, [batch, channels, frames, height, width]."""
        return latents

    @abc.abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the transformer knows them."""

    def clean(self, batch: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """A sample of the distribution that `encode` gave, float32, normalised. `noise` says which, of its shape."""
        mean, logvar = batch["latents_mean"].float(), batch["latents_logvar"].float()
        return self.normalise(mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise)

    # ---- The transformer

    @abc.abstractmethod
    def tokens(self, shape: Sequence[int]) -> int:
        """Of one sample: how many the transformer makes of latents [..., frames, height, width]."""

    @abc.abstractmethod
    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the transformer's forward. `text` is a batch of what `encode_text` gave."""

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        """What the transformer returned, as [batch, channels, frames, height, width]."""
        return output

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A micro-batch as what can go through the transformer together; each part has its own backward."""
        return [dict(batch)]

    def predict(self, transformer: nn.Module, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """One forward. `transformer` may be wrapped, as DDP does."""
        dtype = self.pipeline.transformer.dtype
        inputs = self.inputs(noisy.to(dtype), timestep, {name: _cast(each, dtype) for name, each in text.items()})
        return self.prediction(transformer(**inputs, return_dict=False)[0], noisy.shape)

    # ---- Drawing

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Tensor]:
        """What the pipeline is called with in place of a prompt, so that it needs no text encoder.

        Args:
            guided: whether it is called with classifier-free guidance.
        """
        arguments = self.encode_text([prompt])
        if guided:
            negative = self.encode_text([negative_prompt or ""])
            arguments |= {f"negative_{name}": each for name, each in negative.items()}
        return arguments

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, int]:
        """What the pipeline is called with to draw this size in pixels."""
        size = {"height": height, "width": width}
        return {**size, "num_frames": frames} if self.kind == "video" else size

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """What the pipeline is called with for this much guidance."""
        return {self.guidance_argument: scale}

    def refuse_shift(self) -> None:
        """Raises TrainingError where a shift was given to a family without one."""
        if self.shift is not None:
            raise TrainingError(
                f"shift={self.shift}: {type(self.pipeline.transformer).__name__} is not trained by rectified flow, and "
                "its noise schedule is part of its scheduler. Leave it out."
            )


def part_of(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Of a batch of the loader, the one example of this number."""

    def row(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: row(each) for name, each in value.items()}
        return value[number : number + 1] if isinstance(value, (Tensor, list)) else value

    return {name: row(value) for name, value in batch.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
