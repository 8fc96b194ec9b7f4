"""What becomes of each setting when a run is resumed, as a table, and the comparison with the run of before."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import TrainConfig
from .data.buckets import ASPECTS
from .errors import TrainingError
from .families import Family
from .flag_names import option
from .models import fingerprint
from .prepare import buckets_of

FILE = "settings.json"
"""of a checkpoint: the settings of its run."""


class Resumed(enum.Enum):
    """What becomes of a setting that is not the checkpoint's."""

    KEPT = "the checkpoint's counts"
    GIVEN = "the command line's counts"
    REFUSED = "both must be the same"


SETTINGS = {
    # What the adapter's weights and the optimizer's state are of.
    "adapter": Resumed.REFUSED,
    "rank": Resumed.REFUSED,
    "alpha": Resumed.REFUSED,
    "targets": Resumed.REFUSED,
    "adapter_init": Resumed.KEPT,  # its weights have moved on; what it did to the base model still holds
    "optimizer": Resumed.REFUSED,
    "ema_decay": Resumed.GIVEN,  # but whether there is an average at all must be the same
    # What decides which examples a step has.
    "seed": Resumed.REFUSED,
    "resolution": Resumed.REFUSED,
    "aspects": Resumed.REFUSED,
    "num_frames": Resumed.REFUSED,
    "repeats": Resumed.REFUSED,
    "incomplete_batches": Resumed.REFUSED,
    # Names and folders may move. What is in them is compared: the base model's weights below, the data by the loader.
    "model": Resumed.GIVEN,
    "revision": Resumed.GIVEN,
    "data": Resumed.GIVEN,
    "output_dir": Resumed.GIVEN,
    "cache_dir": Resumed.GIVEN,
    "overwrite": Resumed.GIVEN,
    # Another machine has other processes. All of them together must have the same number of examples in a step.
    "batch_size": Resumed.GIVEN,
    "gradient_accumulation_steps": Resumed.GIVEN,
    "cp_degree": Resumed.GIVEN,
    "ulysses_degree": Resumed.GIVEN,
    "ring_degree": Resumed.GIVEN,
    "rotate_method": Resumed.GIVEN,
    "attn_provider": Resumed.GIVEN,
    "cpu": Resumed.GIVEN,
    "timeout": Resumed.GIVEN,
    "mixed_precision": Resumed.GIVEN,
    "compile": Resumed.GIVEN,
    "gradient_checkpointing": Resumed.GIVEN,
    "find_unused_parameters": Resumed.GIVEN,
    # How training goes on.
    "steps": Resumed.GIVEN,
    "learning_rate": Resumed.GIVEN,
    "adam_betas": Resumed.GIVEN,
    "weight_decay": Resumed.GIVEN,
    "adam_eps": Resumed.GIVEN,
    "lr_schedule": Resumed.GIVEN,
    "lr_warmup_steps": Resumed.GIVEN,
    "max_grad_norm": Resumed.GIVEN,
    "adapter_dropout": Resumed.GIVEN,
    "timestep_sampling": Resumed.GIVEN,
    "logit_mean": Resumed.GIVEN,
    "logit_std": Resumed.GIVEN,
    "mode_scale": Resumed.GIVEN,
    "shift": Resumed.GIVEN,
    "guidance": Resumed.GIVEN,
    # What is made of the examples.
    "fps": Resumed.GIVEN,
    "frame_pick": Resumed.GIVEN,
    "max_upscale": Resumed.GIVEN,
    "crop": Resumed.GIVEN,
    "caption_column": Resumed.GIVEN,
    "caption_dropout": Resumed.GIVEN,
    "max_sequence_length": Resumed.GIVEN,
    "on_bad_data": Resumed.GIVEN,
    "cache_batch_size": Resumed.GIVEN,
    # What is written and said.
    "checkpoint_every": Resumed.GIVEN,
    "checkpoints_kept": Resumed.GIVEN,
    "resume": Resumed.GIVEN,
    "log_every": Resumed.GIVEN,
    "metrics": Resumed.GIVEN,
    "trackers": Resumed.GIVEN,
    "tracker_project": Resumed.GIVEN,
    "validation_prompts": Resumed.GIVEN,
    "validation_every": Resumed.GIVEN,
    "validation_steps": Resumed.GIVEN,
    "validation_guidance": Resumed.GIVEN,
    "validation_size": Resumed.GIVEN,
    "validation_frames": Resumed.GIVEN,
    "evaluation_every": Resumed.GIVEN,
    "evaluation_data": Resumed.GIVEN,
    "evaluation_examples": Resumed.GIVEN,
    "push_to_hub": Resumed.GIVEN,
    "hub_model_id": Resumed.GIVEN,
}
"""every setting of `TrainConfig`."""

_WITH_MODEL = ("targets", "num_frames")
"""settings whose default is the model's: compared when it is loaded."""
_FACTS = {
    "family": "The model is of another family.",
    "base": "The base model has other weights.",
}
"""of a model, what must be the same; and what to say where it is not."""

ANEW = "begin anew with another --output_dir"


class Facts(NamedTuple):
    """What is known once the model is loaded."""

    family: str
    base: str
    """of the transformer's weights, a fingerprint."""
    targets: list[str]
    num_frames: list[int]


def facts_of(config: TrainConfig, family: Family) -> Facts:
    """Of a model without its adapter."""
    targets = sorted(config.targets or family.lora_targets)
    base = fingerprint(family.pipeline.transformer, rounded=True)
    return Facts(type(family).__name__, base, targets, list(buckets_of(config, family).frames))


def settings_of(config: TrainConfig, dp_degree: int) -> dict[str, Any]:
    """What a checkpoint says of its run's settings. Values that follow from others are there as what they come to."""
    examples = config.batch_size * config.gradient_accumulation_steps * dp_degree
    resolved = {
        "alpha": config.alpha or float(config.rank),
        "aspects": config.aspects or ASPECTS,
        "learning_rate": config.rate,
        "lr_warmup_steps": config.warmup_steps,
        "resume": None,
        "overwrite": False,
    }
    found: dict[str, Any] = json.loads(json.dumps({**config.as_dict(), **resolved, "examples of a step": examples}))
    return found


def write_settings(folder: Path, settings: Mapping[str, Any], facts: Facts) -> None:
    """Into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps({**settings, "facts": facts._asdict()}, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """What `write_settings` wrote.

    Raises:
        TrainingError: there is no such file, or it cannot be read.
    """
    try:
        said = json.loads((folder / FILE).read_text())
        if not isinstance(said, dict) or not isinstance(said["facts"], dict):
            raise ValueError("no settings")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"--resume: {folder / FILE} cannot be read ({type(error).__name__}: {error}). Go on from another "
            f"checkpoint, or {ANEW}."
        ) from error
    return said


def resume_settings(config: TrainConfig, before: Mapping[str, Any], dp_degree: int) -> tuple[TrainConfig, list[str]]:
    """Compares settings with those of a checkpoint.

    Args:
        before: from `read_settings`.
        dp_degree: groups of processes that share sequences.

    Returns:
        The settings to go on with, and a line for each that differs.

    Raises:
        TrainingError: for one that must be the same. It names all of these.
    """
    now = settings_of(config, dp_degree)
    kept, lines, refused = {}, [], []
    for name, policy in SETTINGS.items():
        if name not in before or name in _WITH_MODEL or now[name] == before[name]:
            continue  # (a checkpoint of an older version may lack one)
        if policy is Resumed.KEPT:
            kept[name] = before[name]
            lines.append(f"{option(name, before[name])}, as the checkpoint has it, and not {_value(now[name])}")
        elif policy is Resumed.GIVEN:
            lines.append(f"{option(name, now[name])}; until now {_value(before[name])}")
        else:
            refused.append((name, now[name], before[name]))
    if refused:
        here, there = ([option(name, each[i]) for name, *each in refused] for i in range(2))
        raise _refusal(here, there)
    if (now["ema_decay"] is None) != (before.get("ema_decay") is None):
        raise TrainingError(
            f"{option('ema_decay', now['ema_decay'])}: the checkpoint is of a run with "
            f"{option('ema_decay', before.get('ema_decay'))}, and there is an average of all steps or none. Give it as "
            f"it was, or {ANEW}."
        )
    _check_examples(config, before.get("examples of a step"), dp_degree)
    return dataclasses.replace(config, **kept), lines


def _refusal(here: list[str], there: list[str]) -> TrainingError:
    return TrainingError(
        f"{', '.join(here)}: the checkpoint is of {', '.join(there)}, and goes on with that only. Give "
        f"{' '.join(there)}, or {ANEW}."
    )


def _check_examples(config: TrainConfig, before: int | None, dp_degree: int) -> None:
    now = config.batch_size * config.gradient_accumulation_steps * dp_degree
    if before is None or now == before:
        return
    each, rest = divmod(before, dp_degree)
    if rest:
        advice = f"Start a number of processes that divides {before}"
    else:
        batch = max(size for size in range(1, config.batch_size + 1) if each % size == 0)
        advice = f"Give --batch_size {batch} --gradient_accumulation_steps {each // batch}"
    groups = "process" if dp_degree == 1 else "processes, or groups of them that share sequences"
    raise TrainingError(
        f"--batch_size {config.batch_size}, --gradient_accumulation_steps {config.gradient_accumulation_steps} and "
        f"{dp_degree} {groups} are {now} examples in a step, and the checkpoint is of a run with {before}. "
        f"{advice}, or {ANEW}."
    )


def check_facts(facts: Facts, before: Mapping[str, Any]) -> None:
    """Compares a model with that of a checkpoint.

    Raises:
        TrainingError: it is another one, or its adapter goes on other layers.
    """
    kept = before["facts"]
    for name, what in _FACTS.items():
        if name in kept and getattr(facts, name) != kept[name]:
            raise TrainingError(
                f"{what} The checkpoint is of a run with {option('model', before.get('model'))}: give that one, or "
                f"{ANEW}."
            )
    for name in _WITH_MODEL:
        here = getattr(facts, name)
        if kept.get(name, here) != here:
            raise _refusal([option(name, here)], [option(name, kept[name])])


def check_steps(steps: int, step: int, others: list[int]) -> None:
    """Raises TrainingError where a checkpoint has more steps than the run is to have.

    Args:
        steps: of the run.
        step: of the checkpoint.
        others: steps of which there are checkpoints.
    """
    if steps >= step:
        return
    before = [each for each in others if each <= steps]
    earlier = f", or go on from an earlier checkpoint: --resume {before[-1]}" if before else ""
    raise TrainingError(
        f"--steps {steps}: the checkpoint has {step} steps already. Give --steps {step} to write its adapter, or more "
        f"to go on{earlier}."
    )


def _value(value: Any) -> str:
    if value is None:
        return "the default"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
