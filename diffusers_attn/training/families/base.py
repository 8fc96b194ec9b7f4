"""The interface of a model family.

Latents of images and videos have the shape [batch, channels, frames, height, width] everywhere, with one frame for
images. A family converts them to the shapes that its VAE and transformer use.
"""

from __future__ import annotations

import abc
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..data.conditions import Wanted
from ..errors import TrainingError
from ..loss import Level, Objective, RectifiedFlow, scheduler_shift
from ..settings.flag_names import option
from .accepted import check_guidance, check_inputs
from .latents import Latents, Waveform


class Family(abc.ABC):
    """A pipeline with everything that training needs to know about its model.

    Args:
        pipeline: a diffusers pipeline, with its text encoders and VAE until the data are encoded.
        shift: timestep shift. None: the scheduler's. Only for rectified flow.
        guidance: guidance scale that a guidance-distilled model gets as its input. None: 1. Only for such models.
        max_sequence_length: number of text tokens per caption. None: the pipeline's default.
        min_snr_gamma: see `loss.Diffusion`. Not for rectified flow.
        expert: "high", "low" or "both": what to train of a pipeline with one transformer for high and one for low noise
            levels.
        audio_weight: weight of the sound's loss beside that of the video, for models that learn both; 0 trains the
            video alone. None: 1.
        fps: frame rate of the training videos. None: the model's.

    Raises:
        TrainingError: the pipeline, or a setting, is not supported.
    """

    kind: ClassVar[Literal["image", "video"]]
    lora_targets: tuple[str, ...]
    """Default names of the layers that get adapters."""
    text_length: ClassVar[int]
    """Default number of text tokens."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """Argument of the pipeline's call for the guidance scale."""
    negative_prompts: ClassVar[bool] = True
    """Whether a guidance scale above 1 needs a negative prompt. False: the scale is an input of a distilled model."""
    fps: float = 16.0
    """Frame rate of the videos that the model was trained on, to which training videos are resampled by default."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of the supported pipeline classes; subclasses are supported too. Empty: all."""
    provided_inputs: ClassVar[tuple[str, ...]] = ()
    """Entries of `accepted.FURTHER_INPUTS` that `inputs` provides."""
    component: ClassVar[str] = "transformer"
    """Name of the trained component of the pipeline."""
    prediction_types: ClassVar[tuple[str, ...]] = ("flow_prediction",)
    """Accepted values of the scheduler's prediction_type, if its configuration has one."""
    vae_has_frames: ClassVar[bool] = True
    """Whether the VAE's images have a dimension of frames, also those of a single frame."""
    example_conditions: ClassVar[Mapping[str, Wanted]] = {}
    """The pictures and videos that examples are made from, by their kind, one of `data.conditions.CONDITIONS`."""
    references_have_borders: ClassVar[bool] = False
    """Whether reference images of another shape than their example get borders, and are not cropped."""
    text_has_pictures: ClassVar[bool] = False
    """Whether the text encoder sees the reference images, too; see `seeing`."""
    without_gradient: str | None = None
    """Regular expression that is found in the names of the parameters on which no prediction depends. None: there are
    none."""
    learns_sound: ClassVar[bool] = False
    """Whether the model can learn the sound of videos."""
    takes_image: ClassVar[bool] = False
    """Whether the pipeline's call needs an image."""
    image_argument: ClassVar[str] = "image"
    """Argument of the pipeline's call for its images."""
    control_arguments: ClassVar[Mapping[str, str]] = {}
    """Arguments of the pipeline's call for the control of a sample and its mask, by the names of these conditions."""
    conditioned: bool = False
    """Whether `encode` returns more than the latents of images and videos."""
    encoded: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    """Names of the first tensors that the pipeline's `encode_prompt` returns; "" for one that is not used. They are the
    names of the arguments with which the pipeline's call accepts them."""
    encoding_arguments: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's `encode_prompt`."""
    packed: ClassVar[int] = 1
    """Number of latent values per channel that are packed into the channels of one token."""

    def __init__(
        self,
        pipeline: Any,
        *,
        shift: float | None = None,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
        min_snr_gamma: float | None = None,
        expert: str | None = None,
        audio_weight: float | None = None,
        fps: float | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.seen: Tensor | None = None
        self.check_components({name: each is not None for name, each in pipeline.components.items()}, expert)
        self.expert = expert
        # Of a quantised transformer with an adapter, diffusers would find the adapter's dtype.
        self.dtype: torch.dtype = self.transformer.dtype
        self.shift = shift
        self.min_snr_gamma = min_snr_gamma
        self.audio_weight = 1.0 if audio_weight is None else audio_weight
        if audio_weight is not None and not self.learns_sound:
            raise TrainingError(
                f"{option('audio_weight', audio_weight)}: {type(pipeline).__name__} generates no sound. Leave it out."
            )
        check_guidance(self, guidance)
        self.guidance = 1.0 if guidance is None else guidance
        self.max_sequence_length = self._text_length(max_sequence_length)
        check_inputs(self)
        self.check()
        self.fps = fps or self.fps
        self.objective = self.make_objective()
        if min_snr_gamma is not None and isinstance(self.objective, RectifiedFlow):
            raise TrainingError(
                f"{option('min_snr_gamma', min_snr_gamma)}: {type(self.transformer).__name__} is trained with "
                "rectified flow, which has no such weight. Leave it out."
            )

    def check(self) -> None:  # noqa: B027 (most have nothing to check)
        """Raises TrainingError if this pipeline or these settings are not supported."""

    @classmethod
    def check_components(cls, components: Mapping[str, bool], expert: str | None) -> None:
        """Raises TrainingError if a pipeline with these components cannot be trained, or has no such `expert`.

        Args:
            components: whether the pipeline has a component, by name.
            expert: the expert to train.
        """
        two = bool(components.get("transformer_2"))
        if two and expert is None:
            raise TrainingError(
                "this pipeline has a transformer for high noise levels and one for low ones (transformer_2). Give "
                "--expert high or --expert low to train one of them, or --expert both."
            )
        if expert is not None and not two:
            raise TrainingError(
                f"{option('expert', expert)}: this pipeline has one transformer for all noise levels. Leave it out."
            )

    def _text_length(self, wanted: int | None) -> int:
        limit = self.text_limit
        if wanted is None:
            return self.text_length if limit is None else min(self.text_length, limit)
        if limit is not None and wanted > limit:
            raise TrainingError(
                f"{option('max_sequence_length', wanted)}: this {type(self.transformer).__name__} accepts up "
                f"to {limit} text tokens."
            )
        return wanted

    @property
    def text_limit(self) -> int | None:
        """Largest number of text tokens that the transformer accepts; None if unlimited."""
        limit: int | None = self.config.get("max_text_seq_length")
        return limit

    @property
    def input_channels(self) -> int | None:
        """Number of channels that `inputs` gives the transformer; None if unknown."""
        vae = getattr(self.pipeline, "vae", None)
        latents = None if vae is None else vae.config.get("latent_channels", vae.config.get("z_dim"))
        return None if latents is None else latents * self.packed

    @property
    def trained(self) -> dict[str, Any]:
        """The transformers that are trained, by the name of the pipeline's component."""
        names = {"low": ("transformer_2",), "both": ("transformer", "transformer_2")}.get(self.expert or "")
        return {name: getattr(self.pipeline, name) for name in names or (self.component,)}

    @property
    def transformer(self) -> Any:
        """The transformer that is trained; of two, which have the same configuration, the first."""
        return next(iter(self.trained.values()))

    @property
    def other_models(self) -> list[nn.Module]:
        """The models that the pipeline samples and decodes with, besides those that are trained."""
        names = {"transformer", "transformer_2", "vae", "image_encoder"} - self.trained.keys()
        found = [getattr(self.pipeline, name, None) for name in sorted(names)]
        return [each for each in found if each is not None]

    @property
    def levels(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest noise level `u`, before the shift, at which each of `trained` is trained."""
        return dict.fromkeys(self.trained, (0.0, 1.0))

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.transformer.config

    def make_objective(self) -> Objective:
        """The training objective, with the sampler's timestep shift. Here: rectified flow, with the shift of a
        flow-matching scheduler."""
        fixed = self.shift
        return RectifiedFlow(scheduler_shift(self.pipeline.scheduler.config) if fixed is None else lambda tokens: fixed)

    @property
    def text_device(self) -> torch.device:
        """Device of the text encoder. (`pipeline.device` is wrong if its models are on several devices.)"""
        return self.pipeline.text_encoder.device

    # ---- Data

    @property
    def sound_rate(self) -> int | None:
        """Samples per second of the sound of videos that is trained. None: no sound is."""
        return None

    @property
    @abc.abstractmethod
    def size_multiple(self) -> int:
        """Number that height and width in pixels must be multiples of."""

    @property
    def frame_rule(self) -> tuple[int, int]:
        """(step, offset): accepted numbers of frames are a multiple of step, plus offset."""
        return 1, 0

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the reference images of an example or a sample of this size."""
        return height, width

    def seeing(self, references: Tensor) -> Family:
        """This family with the reference images that its text encoder sees, as `seen`. For `text_has_pictures`.

        Args:
            references: float [captions, number, 3, height, width] in [-1, 1].
        """
        found = copy.copy(self)
        found.seen = references
        return found

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """The text inputs of the transformer: tensors [captions, ...] by name, on the CPU."""
        encode_prompt = self.pipeline.encode_prompt
        settings = {
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.max_sequence_length,
            "device": self.text_device,
            **self.encoding_arguments,
        }
        accepted = inspect.signature(encode_prompt).parameters
        with torch.no_grad():
            # A copy of the list, since some pipelines write to it.
            returned = encode_prompt(list(captions), **{name: settings[name] for name in settings if name in accepted})
        return {name: each.cpu() for name, each in zip(self.encoded, returned) if name}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The models that `encode` runs, by component name."""
        return {"vae": self.pipeline.vae}

    def encode(self, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """The VAE's distribution of latents for `pixels`, float [batch, 3, frames, height, width] in [-1, 1].

        Args:
            pixels: images or videos.
            given: their `example_conditions` by kind, also in [-1, 1]: reference images are [batch, number, 3, height,
                width], others have the shape of `pixels`. With a `sound_rate` also "sound", [batch, 2, samples].

        Returns:
            "latents_mean" and "latents_logvar", float32 [batch, channels, frames, height, width], on the CPU, as the
            VAE has them: not scaled yet; and those of further kinds of `latents`. Other names are passed to `inputs`,
            with those of `encode_text`.
        """
        vae = self.pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(self.to_vae(pixels.to(vae.device, vae.dtype))).latent_dist
        mean, logvar = (self.from_vae(each.float().cpu()) for each in (posterior.mean, posterior.logvar))
        return {"latents_mean": mean, "latents_logvar": logvar}

    def to_vae(self, pixels: Tensor) -> Tensor:
        """Converts pixels [batch, 3, frames, height, width] to the VAE's input shape."""
        return pixels if self.vae_has_frames else pixels.squeeze(2)

    def from_vae(self, latents: Tensor) -> Tensor:
        """Converts the VAE's output to [batch, channels, frames, height, width]."""
        return latents if self.vae_has_frames else latents.unsqueeze(2)

    @abc.abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """Scales the VAE's latents to the transformer's range."""

    @property
    def latents(self) -> dict[str, Latents]:
        """The kinds of latents that the transformer learns, in the order of its outputs, by their prefix: of the
        tensors that `encode` returns, "latents_mean" belongs to the kind "", which are those of images and videos, and
        "latents_audio_mean" to the kind "audio_"."""
        return {"": Latents(self.normalise, self.prediction, self.loss)}

    # ---- The transformer

    @abc.abstractmethod
    def tokens(self, shape: Sequence[int]) -> int:
        """Number of tokens that the transformer makes of one sample's latents of shape [..., frames, height, width]."""

    @abc.abstractmethod
    def inputs(self, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the transformer's forward.

        Args:
            noisy: latents [batch, channels, frames, height, width].
            timestep: from the objective's `level`, [batch].
            text: a batch of the tensors that `encode_text` returned, of those that `encode` returned besides latents,
                and noisy latents of further kinds.
        """

    def prediction(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        """Converts the transformer's output to the latents' shape [batch, channels, frames, height, width]."""
        return output

    def loss(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, level: Level, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample; see `Loss`."""
        return self.objective.loss(prediction, clean, noise, level, mask)

    def parts(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Divides a micro-batch into parts for separate forward and backward passes. Default: one part."""
        return [dict(batch)]

    def predict(
        self, transformer: Callable[..., Any], noisy: Mapping[str, Tensor], timestep: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Runs one forward.

        Args:
            transformer: the model, which may be wrapped, for example by DDP.
            noisy: latents of each kind.
            timestep, text: as for `inputs`, which gets latents of further kinds in `text`, such as "audio_noisy".

        Returns:
            The prediction for each kind, in the shape of its latents.
        """
        text = {**text, **{f"{kind}noisy": each for kind, each in noisy.items() if kind}}
        cast = {name: _cast(each, self.dtype) for name, each in text.items()}
        outputs = transformer(**self.inputs(noisy[""].to(self.dtype), timestep, cast), return_dict=False)
        return {
            kind: each.prediction(output, noisy[kind].shape)
            for (kind, each), output in zip(self.latents.items(), outputs)
        }

    # ---- Generation

    def prompt_arguments(self, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
        """The pipeline's arguments for an encoded prompt, with which it needs no text encoder: tensors, or lists.

        Args:
            prompt: the prompt.
            negative_prompt: the negative prompt. None: the empty one.
            guided: whether the pipeline is called with classifier-free guidance.
        """
        arguments = self.encode_text([prompt])
        if guided and self.negative_prompts:
            negative = self.encode_negative(negative_prompt or "")
            arguments |= {f"negative_{name}": each for name, each in negative.items()}
        return arguments

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        """The text inputs of the transformer for a negative prompt, in the form of `encode_text`."""
        return self.encode_text([prompt])

    @property
    def default_guidance(self) -> float:
        """Guidance scale of the pipeline's call if none is given."""
        scale: float = inspect.signature(self.pipeline.__call__).parameters[self.guidance_argument].default
        return scale

    def size_arguments(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """The pipeline's arguments for a sample's size, in frames and pixels."""
        size = {"height": height, "width": width}
        return {**size, "num_frames": frames} if self.kind == "video" else size

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """The pipeline's arguments for a guidance scale."""
        return {self.guidance_argument: scale}

    def drawn_sound(self, output: Any) -> Waveform | None:
        """The sound of the first sample in the output of the pipeline's call. None: it has none."""
        return None

    def refuse_shift(self) -> None:
        """Raises TrainingError if a shift was given. For families that are not trained with rectified flow."""
        if self.shift is not None:
            raise TrainingError(
                f"shift={self.shift}: {type(self.transformer).__name__} is not trained with rectified flow; "
                "its scheduler has a fixed noise schedule. Leave it out."
            )


def part_of(batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The example at index `number` of a loader's batch, as a batch of one."""

    def row(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: row(each) for name, each in value.items()}
        return value[number : number + 1] if isinstance(value, (Tensor, list)) else value

    return {name: row(value) for name, value in batch.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
