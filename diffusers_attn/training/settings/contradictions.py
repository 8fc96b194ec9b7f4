"""Settings that contradict each other, or have no effect because of another one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from .choices import CONDITIONS, IN_DIFFUSERS_FORMAT, WHOLE, WITHOUT_WARMUP
from .flag_names import option
from .setting import default_of, metadata_of

if TYPE_CHECKING:
    from .config import TrainConfig


def fields_of(config: TrainConfig) -> dict[str, dataclasses.Field[Any]]:
    """The fields of the settings by name."""
    return {field.name: field for field in dataclasses.fields(config)}


def check_together(config: TrainConfig) -> None:
    """Raises TrainingError for two settings that contradict each other."""
    sources = config.sources
    if config.offload != "none" and not config.gradient_checkpointing:
        raise TrainingError(
            f"{option('offload', config.offload)} with --no-gradient_checkpointing: the backward pass would keep the "
            "weights of all blocks on the device. Leave one of them out."
        )
    if config.offload != "none" and config.compile is True:
        raise TrainingError(
            f"{option('offload', config.offload)} with --compile: compiled blocks keep their weights. Leave one of "
            "them out."
        )
    if config.adapter == WHOLE:
        for name, none in (("base_precision", None), ("offload", "none")):
            if getattr(config, name) != none:
                raise TrainingError(
                    f"{option(name, getattr(config, name))} with {option('adapter', WHOLE)}, which trains the "
                    "transformer's own weights, in float32 and on the device. Leave one of them out."
                )
    if config.transformer is not None and config.expert == "both":
        raise TrainingError(
            f"{option('transformer', config.transformer)} with --expert both: these are the weights of one "
            "transformer. Train each expert in a run of its own, or put both into the folder of --model."
        )
    for name in CONDITIONS:
        if getattr(config, name) is not None and config.datasets:
            raise TrainingError(
                f"{option(name, getattr(config, name))} is accepted with --data only, not with further datasets, whose "
                f"files may have the same names. Put all examples into one folder, or give each set a column {name}."
            )
    if sources and all(each.regularisation for each in sources):
        raise TrainingError(
            "datasets: all sets are for regularisation, which balances another set. Give one without it."
        )
    if config.clips != "middle" and config.frame_pick == "spread":
        raise TrainingError(
            f"{option('clips', config.clips)} with {option('frame_pick', 'spread')}, which spreads the frames of one "
            "clip over the entire video. Leave one of them out."
        )
    if config.init_adapter is not None and config.adapter_init != "default":
        raise TrainingError(
            f"{option('init_adapter', config.init_adapter)} with {option('adapter_init', config.adapter_init)}: the "
            "adapter's weights come from the file. Leave one of them out."
        )
    if config.init_adapter is not None and config.adapter not in IN_DIFFUSERS_FORMAT:
        raise TrainingError(
            f"{option('init_adapter', config.init_adapter)} is accepted for --adapter "
            f"{', '.join(IN_DIFFUSERS_FORMAT)}, not for {option('adapter', config.adapter)}. Leave it out."
        )
    if config.lr_warmup_steps is not None and config.lr_warmup_steps > config.steps:
        raise TrainingError(
            f"{option('lr_warmup_steps', config.lr_warmup_steps)} with {option('steps', config.steps)}: the learning "
            "rate would never reach its peak. Give fewer warm-up steps, or leave --lr_warmup_steps out."
        )
    if config.lr_warmup_steps and config.lr_schedule in WITHOUT_WARMUP:
        raise TrainingError(
            f"{option('lr_warmup_steps', config.lr_warmup_steps)} with {option('lr_schedule', config.lr_schedule)}, "
            f"which has no warm-up. Leave it out, or give {option('lr_schedule', 'constant_with_warmup')}."
        )
    if config.rate * config.weight_decay >= 1:
        raise TrainingError(
            f"{option('weight_decay', config.weight_decay)} with a learning rate of {config.rate:g}: weights would "
            "change their sign in each step. The product of the two must be below 1."
        )
    if config.adapter not in IN_DIFFUSERS_FORMAT and config.adapter_init != "default":
        raise TrainingError(
            f"{option('adapter_init', config.adapter_init)} is accepted for --adapter "
            f"{', '.join(IN_DIFFUSERS_FORMAT)}, not for {option('adapter', config.adapter)}. Leave it out."
        )
    if config.adapter_init == "orthogonal" and config.rank % 2:
        raise TrainingError(
            f"{option('adapter_init', 'orthogonal')} with {option('rank', config.rank)}: it needs an even rank."
        )


def check_effect(config: TrainConfig, **resolved: Any) -> None:
    """Raises TrainingError for a setting that was changed although another setting leaves it without effect.

    Args:
        config: the settings.
        resolved: values of settings that are None until the model is loaded, such as `timestep_sampling`.
    """
    for name, field in fields_of(config).items():
        value, needs = getattr(config, name), metadata_of(field).needs
        if not needs or value == default_of(field):
            continue
        other, *values = needs
        found = resolved.get(other) or getattr(config, other)
        if values and found is None:  # depends on the model
            continue
        if found not in values if values else not found:
            with_other = f"with {option(other, found)}" if found else f"without --{other}"
            needed = " or ".join(option(other, each) for each in values) or f"--{other}"
            raise TrainingError(f"{option(name, value)} has no effect {with_other}. Leave it out, or give {needed}.")
