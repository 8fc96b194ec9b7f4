# ruff: noqa: RUF009 (`_setting` makes a dataclass field, with what the command line needs)
"""All settings of a training run, once: as a dataclass, as a command line, and checked before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .bounds import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds
from .errors import TrainingError
from .flag_names import option
from .lora import IN_DIFFUSERS_FORMAT, INITIALISATIONS, KINDS
from .loss import SAMPLINGS
from .once import say_once
from .optim import OPTIMIZERS, SCHEDULES, WITHOUT_WARMUP

WARMUP_STEPS = 50
"""where a user says nothing, for runs of at least ten times as many steps; in shorter ones, a tenth of them."""


def _setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    length: int | None = None,
) -> Any:
    """A field of `TrainConfig`.

    Args:
        bounds: of a number, or of each of several. Every numeric setting has them.
        length: how many numbers there are, where that is fixed.
    """
    metadata = {"help": help, "choices": choices, "bounds": bounds, "length": length}
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
    overwrite: bool = _setting(False, "replace what an earlier run left in output_dir")
    revision: str | None = _setting(None, "of the model on the Hub")

    cp_degree: int | None = _setting(
        None, "processes that share each sequence (default: 1, or what Accelerate says)", bounds=COUNT
    )
    ulysses_degree: int | None = _setting(None, "of them, those that exchange heads (default: chosen)", bounds=COUNT)
    ring_degree: int | None = _setting(
        None, "of them, those between which keys and values travel (default: chosen)", bounds=COUNT
    )
    rotate_method: str | None = _setting(None, "how they travel (default: chosen)", ("allgather", "alltoall"))
    attn_provider: str | None = _setting(None, "the attention kernel: flash_4, _native_cudnn, ... (default: chosen)")
    cpu: bool = _setting(False, "train on CPUs though there are GPUs")
    timeout: float | None = _setting(
        None,
        "seconds that processes wait for one that does not come (default: 3600; of a job that is running, its own)",
        bounds=POSITIVE,
    )
    mixed_precision: str | None = _setting(
        None,
        "bf16: the base model in bfloat16, the adapter in float32 (default: as accelerate launch says)",
        ("no", "bf16"),
    )
    compile: bool = _setting(False, "compile the transformer's blocks")
    gradient_checkpointing: bool = _setting(True, "recompute activations in the backward, to save memory")
    find_unused_parameters: bool = _setting(False, "of DDP: for --targets of which some have no part in the loss")

    resolution: list[int] = _setting(
        [512], "buckets have about this many pixels squared; several are accepted", bounds=Bounds(1, 2**14)
    )
    aspects: list[float] | None = _setting(
        None, "width by height of buckets (default: the usual ones)", bounds=Bounds(1 / 32, 32)
    )
    num_frames: list[int] | None = _setting(
        None,
        "frames of buckets; several are accepted (default: 1 for pictures, 49 or the nearest below for videos)",
        bounds=COUNT,
    )
    fps: float | None = _setting(None, "of videos, the rate that is trained (default: their own)", bounds=POSITIVE)
    frame_pick: str = _setting("consecutive", "which frames of a video", ("consecutive", "spread"))
    max_upscale: float = _setting(1.25, "how far examples may be enlarged for a bucket", bounds=POSITIVE)
    crop: str = _setting("centre", "what stands over a bucket is cut", ("centre", "random"))
    repeats: int = _setting(1, "how often an epoch has each example", bounds=COUNT)
    incomplete_batches: str = _setting("fill", "what becomes of the rest of a bucket", ("fill", "drop"))
    caption_column: str | None = _setting(None, "of the metadata or dataset (default: caption, text or prompt)")
    caption_dropout: float = _setting(0.1, "share of captions that are left out, for guidance", bounds=PROBABILITY)
    max_sequence_length: int | None = _setting(None, "tokens of text (default: the model's)", bounds=COUNT)
    on_bad_data: str = _setting("refuse", "what cannot be read is named, and ...", ("refuse", "skip"))
    cache_dir: str | None = _setting(None, "for latents and text embeddings (default: cache in output_dir)")
    cache_batch_size: int = _setting(1, "examples that are encoded together", bounds=COUNT)

    adapter: str = _setting("lora", "kind", KINDS)
    rank: int = _setting(16, "of the adapter", bounds=COUNT)
    alpha: float | None = _setting(None, "the adapter counts alpha / rank (default: rank)", bounds=POSITIVE)
    targets: list[str] | None = _setting(None, "names of layers that get one (default: the attention's)")
    adapter_init: str = _setting(
        "default", "how it starts; what olora trains is written as an adapter of twice the rank", INITIALISATIONS
    )
    adapter_dropout: float = _setting(0.0, "of the adapter's input", bounds=BELOW_ONE)

    steps: int = _setting(1000, "optimizer steps", bounds=COUNT)
    batch_size: int = _setting(
        1, "examples of one forward on one process, or group that shares sequences", bounds=COUNT
    )
    gradient_accumulation_steps: int = _setting(1, "forwards of a step", bounds=COUNT)
    optimizer: str = _setting("adamw", "by name", tuple(OPTIMIZERS))
    learning_rate: float | None = _setting(
        None, "the peak (default: 1e-4; of prodigy 1.0)", bounds=Bounds(0, 100, low_is_in=False)
    )
    adam_betas: list[float] = _setting([0.9, 0.999], "of the optimizer", bounds=BELOW_ONE, length=2)
    weight_decay: float = _setting(0.01, "of the optimizer", bounds=NOT_NEGATIVE)
    adam_eps: float = _setting(1e-8, "of the optimizer", bounds=Bounds(0, 1, low_is_in=False))
    lr_schedule: str = _setting("constant_with_warmup", "of the learning rate", SCHEDULES)
    lr_warmup_steps: int | None = _setting(
        None, f"steps in which it rises (default: {WARMUP_STEPS}, or a tenth of a short run)", bounds=NOT_NEGATIVE
    )
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm; 0 does not clip", bounds=NOT_NEGATIVE)
    ema_decay: float | None = _setting(
        None,
        "average the adapter over steps with this decay, for instance 0.999",
        bounds=Bounds(0, 1, low_is_in=False, high_is_in=False),
    )
    seed: int = _setting(0, "of everything that is random", bounds=Bounds(0, 2**63 - 1))

    timestep_sampling: str | None = _setting(
        None, "how much noise (default: logit_normal; uniform for v-prediction)", SAMPLINGS
    )
    logit_mean: float = _setting(0.0, "of logit_normal", bounds=Bounds(-10, 10))
    logit_std: float = _setting(1.0, "of logit_normal", bounds=Bounds(0, 10, low_is_in=False))
    mode_scale: float = _setting(1.29, "of mode", bounds=Bounds(-1, 1.75))
    shift: float | None = _setting(None, "towards noise (default: as the model's sampler does)", bounds=POSITIVE)
    guidance: float | None = _setting(
        None, "what a model that was distilled from guidance is told in training (default: 1)", bounds=NOT_NEGATIVE
    )

    checkpoint_every: int = _setting(250, "steps; 0 is only at the end", bounds=NOT_NEGATIVE)
    checkpoints_kept: int = _setting(2, "the newest; 0 keeps all", bounds=NOT_NEGATIVE)
    resume: str | None = _setting(None, "from 'latest', a step, or a checkpoint's folder")

    log_every: int = _setting(1, "steps", bounds=COUNT)
    metrics: bool = _setting(True, "write what is logged to metrics.jsonl in output_dir, a line of JSON for each entry")
    trackers: list[str] | None = _setting(None, "of Accelerate: tensorboard, wandb, ...")
    tracker_project: str = _setting("diffusers_attn", "name of the project at a tracker")
    validation_prompts: list[str] | None = _setting(None, "are drawn as training goes on, and for the card at its end")
    validation_every: int = _setting(250, "steps; 0 is only at the end", bounds=NOT_NEGATIVE)
    validation_steps: int = _setting(28, "of the sampler", bounds=Bounds(1, 1000))
    validation_guidance: float | None = _setting(None, "guidance scale (default: the pipeline's)", bounds=NOT_NEGATIVE)
    validation_size: list[int] | None = _setting(
        None, "height and width (default: of the first bucket)", bounds=COUNT, length=2
    )
    validation_frames: int | None = _setting(None, "of videos (default: of the first bucket)", bounds=COUNT)
    evaluation_every: int = _setting(0, "steps between losses at fixed noise levels; 0 is never", bounds=NOT_NEGATIVE)
    evaluation_data: str | None = _setting(None, "for these (default: the first examples of --data)")
    evaluation_examples: int = _setting(4, "how many", bounds=COUNT)

    push_to_hub: bool = _setting(False, "upload the adapter and its card when done")
    hub_model_id: str | None = _setting(None, "name of the repository (default: that of output_dir)")

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise TrainingError(f"--{name} is missing: it is {_fields()[name].metadata['help']}.")
        hints = typing.get_type_hints(TrainConfig)
        for name, field in _fields().items():
            self._check_choice(name, field.metadata["choices"])
            if field.metadata["bounds"] is not None:
                self._check_numbers(name, hints[name], field)
        if self.lr_warmup_steps is not None and self.lr_warmup_steps > self.steps:
            raise TrainingError(
                f"{option('lr_warmup_steps', self.lr_warmup_steps)} with {option('steps', self.steps)}: the learning "
                "rate would never come to its peak. Give fewer steps of warm-up, or leave --lr_warmup_steps out."
            )
        if self.lr_warmup_steps and self.lr_schedule in WITHOUT_WARMUP:
            raise TrainingError(
                f"{option('lr_warmup_steps', self.lr_warmup_steps)} with {option('lr_schedule', self.lr_schedule)}, "
                f"which has no warm-up. Leave it out, or give {option('lr_schedule', 'constant_with_warmup')}."
            )
        if self.rate * self.weight_decay >= 1:
            raise TrainingError(
                f"{option('weight_decay', self.weight_decay)} with a learning rate of {self.rate:g}: each step would "
                "take more than all of the weights away. Their product must be below 1."
            )
        if self.adapter not in IN_DIFFUSERS_FORMAT and self.adapter_init != "default":
            raise TrainingError(
                f"{option('adapter_init', self.adapter_init)} is for --adapter {', '.join(IN_DIFFUSERS_FORMAT)}, not "
                f"for {option('adapter', self.adapter)}. Leave it out."
            )
        if self.adapter_init == "orthogonal" and self.rank % 2:
            raise TrainingError(
                f"{option('adapter_init', 'orthogonal')} with {option('rank', self.rank)}: it needs an even rank."
            )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise TrainingError(
                f"{option('hub_model_id', self.hub_model_id)} without --push_to_hub. Add it, or leave both out."
            )
        if self.evaluation_data is not None and not self.evaluation_every:
            raise TrainingError(
                f"{option('evaluation_data', self.evaluation_data)} without --evaluation_every. Set it to a number."
            )

    def _check_choice(self, name: str, choices: Sequence[str] | None) -> None:
        value = getattr(self, name)
        if choices is not None and value is not None and value not in choices:
            raise TrainingError(f"{option(name, value)}: accepted are {', '.join(choices)}.")

    def _check_numbers(self, name: str, hint: Any, field: dataclasses.Field[Any]) -> None:
        """Against the type, the bounds and the length of the setting."""
        value, bounds, length = getattr(self, name), field.metadata["bounds"], field.metadata["length"]
        if value is None and type(None) in typing.get_args(hint):
            return
        several, whole = _several(hint), _number(hint) is int
        kind = "whole numbers" if whole else "numbers"
        if several and (not isinstance(value, (list, tuple)) or len(value) != (length or len(value) or 1)):
            count = f"{length} {kind}" if length else f"one or more {kind}"
            raise TrainingError(f"{option(name, value)}: {count} are accepted, {field.metadata['help']}.")
        for each in value if several else [value]:
            if each not in bounds or (whole and not isinstance(each, int)):
                raise TrainingError(f"{option(name, value)}: {kind} {bounds} are accepted.")

    @property
    def rate(self) -> float:
        """The peak of the learning rate."""
        return OPTIMIZERS[self.optimizer].learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises; 0 for a schedule without."""
        if self.lr_schedule in WITHOUT_WARMUP:
            return 0
        return min(WARMUP_STEPS, self.steps // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps

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
        parser = _Parser(formatter_class=_Help, allow_abbrev=False, **settings)
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
            parser.error(str(error))


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(TrainConfig)}


def _default(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return factory() if field.default is dataclasses.MISSING else field.default


def _not_none(hint: Any) -> Any:
    """The type of a setting that may be left out."""
    if isinstance(hint, types.UnionType):
        return next(each for each in typing.get_args(hint) if each is not type(None))
    return hint


def _several(hint: Any) -> bool:
    return typing.get_origin(_not_none(hint)) is list


def _number(hint: Any) -> Any:
    """The type of a setting's value, or of each of its values."""
    hint = _not_none(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage, whose many lines would hide the message, and by one process of a job."""
        say_once(f"{self.prog}: {message}\nAll settings: {self.prog} --help")
        self.exit(2)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def _add(group: Any, name: str, hint: Any, field: dataclasses.Field[Any]) -> None:
    """An argument of the setting's type."""
    default, help = _default(field), field.metadata["help"]
    hint = _not_none(hint)
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
