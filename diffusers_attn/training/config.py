# ruff: noqa: RUF009 (`_setting` makes a dataclass field, with what the command line needs)
"""All settings of a training run, once: as a dataclass, as a command line, and checked before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import TrainingError
from .lora import IN_DIFFUSERS_FORMAT, INITIALISATIONS, KINDS
from .loss import SAMPLINGS
from .optim import OPTIMIZERS, SCHEDULES


def _setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


GROUPS = {
    "model": "what is trained on what",
    "cp_degree": "processes and attention",
    "resolution": "data",
    "adapter": "the adapter",
    "steps": "training",
    "timestep_sampling": "noise",
    "checkpoint_every": "checkpoints",
    "log_every": "seeing it",
    "push_to_hub": "publishing it",
}
"""the first setting of each group, and its heading in --help."""


@dataclasses.dataclass
class TrainConfig:
    """The settings of a run. Each is an argument of `examples/train_lora.py` of the same name.

    Raises:
        TrainingError: a value that is not accepted, or values that do not go together; names the setting.
    """

    model: str = _setting("", "a folder or a name on the Hub: a pipeline of Flux, Wan, CogVideoX or CogView4")
    data: str = _setting("", "a folder of pictures or videos with captions, or a Hugging Face dataset")
    output_dir: str = _setting("outputs/lora", "where adapter, checkpoints, samples and card go")
    revision: str | None = _setting(None, "of the model on the Hub")

    cp_degree: int | None = _setting(None, "processes that share each sequence (default: 1, or what Accelerate says)")
    ulysses_degree: int | None = _setting(None, "of them, those that exchange heads (default: chosen)")
    ring_degree: int | None = _setting(None, "of them, those between which keys and values travel (default: chosen)")
    rotate_method: str | None = _setting(None, "how they travel (default: chosen)", ("allgather", "alltoall"))
    attn_provider: str | None = _setting(None, "the attention kernel: flash_4, _native_cudnn, ... (default: chosen)")
    cpu: bool = _setting(False, "train on CPUs though there are GPUs")
    mixed_precision: str | None = _setting(
        None,
        "bf16: the base model in bfloat16, the adapter in float32 (default: as accelerate launch says)",
        ("no", "bf16"),
    )
    compile: bool = _setting(False, "compile the transformer's blocks")
    gradient_checkpointing: bool = _setting(True, "recompute activations in the backward, to save memory")
    find_unused_parameters: bool = _setting(False, "of DDP: for --targets of which some have no part in the loss")

    resolution: list[int] = _setting([512], "buckets have about this many pixels squared; several are accepted")
    aspects: list[float] | None = _setting(None, "width by height of buckets (default: the usual ones)")
    num_frames: list[int] | None = _setting(
        None, "frames of buckets; several are accepted (default: 1 for pictures, 49 or the nearest below for videos)"
    )
    fps: float | None = _setting(None, "of videos, the rate that is trained (default: their own)")
    frame_pick: str = _setting("consecutive", "which frames of a video", ("consecutive", "spread"))
    max_upscale: float = _setting(1.25, "how far examples may be enlarged for a bucket")
    crop: str = _setting("centre", "what stands over a bucket is cut", ("centre", "random"))
    repeats: int = _setting(1, "how often an epoch has each example")
    incomplete_batches: str = _setting("fill", "what becomes of the rest of a bucket", ("fill", "drop"))
    caption_column: str | None = _setting(None, "of the metadata or dataset (default: caption, text or prompt)")
    caption_dropout: float = _setting(0.1, "share of captions that are left out, for guidance")
    max_sequence_length: int | None = _setting(None, "tokens of text (default: the model's)")
    on_bad_data: str = _setting("refuse", "what cannot be read is named, and ...", ("refuse", "skip"))
    cache_dir: str | None = _setting(None, "for latents and text embeddings (default: cache in output_dir)")
    cache_batch_size: int = _setting(1, "examples that are encoded together")

    adapter: str = _setting("lora", "kind", KINDS)
    rank: int = _setting(16, "of the adapter")
    alpha: float | None = _setting(None, "the adapter counts alpha / rank (default: rank)")
    targets: list[str] | None = _setting(None, "names of layers that get one (default: the attention's)")
    adapter_init: str = _setting("default", "how it starts", INITIALISATIONS)
    adapter_dropout: float = _setting(0.0, "of the adapter's input")

    steps: int = _setting(1000, "optimizer steps")
    batch_size: int = _setting(1, "examples of one forward on one process, or group that shares sequences")
    gradient_accumulation_steps: int = _setting(1, "forwards of a step")
    optimizer: str = _setting("adamw", "by name", tuple(OPTIMIZERS))
    learning_rate: float | None = _setting(None, "the peak (default: 1e-4; of prodigy 1.0)")
    adam_betas: list[float] = _setting([0.9, 0.999], "of the optimizer")
    weight_decay: float = _setting(0.01, "of the optimizer")
    adam_eps: float = _setting(1e-8, "of the optimizer")
    lr_schedule: str = _setting("constant_with_warmup", "of the learning rate", SCHEDULES)
    lr_warmup_steps: int = _setting(50, "steps in which it rises")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm; 0 does not clip")
    ema_decay: float | None = _setting(None, "average the adapter over steps with this decay, for instance 0.999")
    seed: int = _setting(0, "of everything that is random")

    timestep_sampling: str | None = _setting(
        None, "how much noise (default: logit_normal; uniform for v-prediction)", SAMPLINGS
    )
    logit_mean: float = _setting(0.0, "of logit_normal")
    logit_std: float = _setting(1.0, "of logit_normal")
    mode_scale: float = _setting(1.29, "of mode")
    shift: float | None = _setting(None, "towards noise (default: as the model's sampler does)")
    guidance: float = _setting(1.0, "what a model that was distilled from guidance is told in training")

    checkpoint_every: int = _setting(250, "steps; 0 is only at the end")
    checkpoints_kept: int = _setting(2, "the newest; 0 keeps all")
    resume: str | None = _setting(None, "from 'latest', a step, or a checkpoint's folder")

    log_every: int = _setting(1, "steps")
    metrics: bool = _setting(True, "write what is logged to metrics.jsonl in output_dir, a line of JSON for each entry")
    trackers: list[str] | None = _setting(None, "of Accelerate: tensorboard, wandb, ...")
    tracker_project: str = _setting("diffusers_attn", "name of the project at a tracker")
    validation_prompts: list[str] | None = _setting(None, "are drawn as training goes on, and for the card at its end")
    validation_every: int = _setting(250, "steps; 0 is only at the end")
    validation_steps: int = _setting(28, "of the sampler")
    validation_guidance: float | None = _setting(None, "guidance scale (default: the pipeline's)")
    validation_size: list[int] | None = _setting(None, "height and width (default: of the first bucket)")
    validation_frames: int | None = _setting(None, "of videos (default: of the first bucket)")
    evaluation_every: int = _setting(0, "steps between losses at fixed noise levels; 0 is never")
    evaluation_data: str | None = _setting(None, "for these (default: the first examples of --data)")
    evaluation_examples: int = _setting(4, "how many")

    push_to_hub: bool = _setting(False, "upload the adapter and its card when done")
    hub_model_id: str | None = _setting(None, "name of the repository (default: that of output_dir)")

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise TrainingError(f"{name} is missing: it is {_fields()[name].metadata['help']}.")
        for name, field in _fields().items():
            self._check_choice(name, field.metadata["choices"])
        for name in (
            "rank", "steps", "batch_size", "gradient_accumulation_steps", "repeats", "cache_batch_size", "log_every",
            "validation_steps", "evaluation_examples",
        ):  # fmt: skip
            self._check_least(name, 1)
        for name in ("checkpoint_every", "checkpoints_kept", "validation_every", "evaluation_every", "lr_warmup_steps"):
            self._check_least(name, 0)
        for name in ("caption_dropout", "adapter_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name}={getattr(self, name)}: it is a probability, from 0 to 1.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise TrainingError(f"ema_decay={self.ema_decay}: it lies between 0 and 1, for instance 0.999.")
        if self.shift is not None and not self.shift > 0:
            raise TrainingError(f"shift={self.shift}: it is a number above 0; 1 changes nothing.")
        if len(self.adam_betas) != 2:
            raise TrainingError(f"adam_betas={self.adam_betas}: they are two numbers, such as 0.9 0.999.")
        if self.validation_size is not None and len(self.validation_size) != 2:
            raise TrainingError(f"validation_size={self.validation_size}: it is a height and a width.")
        if self.adapter not in IN_DIFFUSERS_FORMAT and self.adapter_init != "default":
            raise TrainingError(
                f"adapter_init={self.adapter_init!r} is for {', '.join(IN_DIFFUSERS_FORMAT)}, not for "
                f"adapter={self.adapter!r}. Leave it out."
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise TrainingError(f"hub_model_id={self.hub_model_id!r} without push_to_hub. Add it, or leave both out.")
        if self.evaluation_data is not None and not self.evaluation_every:
            raise TrainingError(
                f"evaluation_data={self.evaluation_data!r} without evaluation_every. Set it to a number."
            )

    def _check_choice(self, name: str, choices: Sequence[str] | None) -> None:
        value = getattr(self, name)
        if choices is not None and value is not None and value not in choices:
            raise TrainingError(f"{name}={value!r}: accepted are {', '.join(map(repr, choices))}.")

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TrainingError(f"{name}={value!r}: a whole number from {least} is accepted.")

    @property
    def output(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @property
    def cache(self) -> Path:
        """Where latents and embeddings are kept."""
        return Path(self.cache_dir) if self.cache_dir else self.output / "cache"

    def as_dict(self) -> dict[str, Any]:
        """Names and values, as JSON takes them."""
        return dataclasses.asdict(self)

    @staticmethod
    def parser(**settings: Any) -> argparse.ArgumentParser:
        """A command line with an argument for every setting. `settings` are argparse's own, such as description."""
        parser = argparse.ArgumentParser(formatter_class=_Help, allow_abbrev=False, **settings)
        group: Any = parser
        hints = typing.get_type_hints(TrainConfig)
        for name, field in _fields().items():
            if name in GROUPS:
                group = parser.add_argument_group(GROUPS[name])
            _add(group, name, hints[name], field)
        return parser

    @staticmethod
    def from_arguments(arguments: Sequence[str] | None = None, **settings: Any) -> TrainConfig:
        """The settings of a command line; None is this process's. What is not accepted ends it with a message."""
        parser = TrainConfig.parser(**settings)
        try:
            return TrainConfig(**vars(parser.parse_args(arguments)))
        except TrainingError as error:
            parser.error(f"--{error}")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(TrainConfig)}


def _default(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return factory() if field.default is dataclasses.MISSING else field.default


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def _add(group: Any, name: str, hint: Any, field: dataclasses.Field[Any]) -> None:
    """An argument of the setting's type."""
    default, help = _default(field), field.metadata["help"]
    if isinstance(hint, types.UnionType):  # with None: not given
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    told = default not in (None, "", []) and not isinstance(default, bool)
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    common: dict[str, Any] = {"default": default, "help": f"{help} ({shown})" if told else help}
    if hint is bool:
        common["help"] = f"{help} ({'on' if default else 'off'})"
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **common)
    elif typing.get_origin(hint) is list:
        group.add_argument(f"--{name}", nargs="+", type=typing.get_args(hint)[0], metavar=_metavar(name), **common)
    else:
        choices = field.metadata["choices"]
        required = default == ""
        group.add_argument(
            f"--{name}",
            type=hint,
            choices=choices,
            required=required,
            metavar=None if choices else _metavar(name),
            **common,
        )


def _metavar(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()
