"""A table with the policy of each setting when a run is resumed, and the comparison with the checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...json_files import read_json
from ..batches.buckets import buckets_of
from ..data.buckets import ASPECTS
from ..errors import TrainingError
from ..families import Family
from ..model.pipeline import fingerprint
from ..settings.choices import QUANTISED, WITHOUT_ALPHA
from ..settings.config import TrainConfig
from ..settings.flag_names import option

FILE = "settings.json"
"""File of a checkpoint with the settings of its run."""


class Resumed(enum.Enum):
    """Policy for a setting whose value differs from the checkpoint's."""

    KEPT = "the checkpoint's value is used"
    GIVEN = "the command line's value is used"
    REFUSED = "the values must be equal"


_REFUSED = """
    adapter rank alpha targets optimizer expert base_precision
    seed resolution aspects num_frames clips repeats incomplete_batches
"""
"""The first row determines what the adapter's weights and the optimizer's state mean, the second the examples of a
step."""
_GIVEN = """
    model transformer revision data datasets references control control_mask output_dir cache_dir overwrite dry_run
    batch_size gradient_accumulation_steps cp_degree ulysses_degree ring_degree rotate_method attn_provider cpu timeout
    mixed_precision compile gradient_checkpointing offload find_unused_parameters
    init_adapter format
    steps learning_rate adam_betas weight_decay adam_eps lr_schedule lr_warmup_steps max_grad_norm adapter_dropout
    ema_decay timestep_sampling logit_mean logit_std mode_scale shift min_snr_gamma audio_weight guidance
    fps frame_pick max_upscale crop caption_column caption_lines trigger_word shuffle_tags keep_tags caption_dropout
    max_sequence_length loss_mask on_bad_data cache_batch_size
    checkpoint_every checkpoints_kept resume log_every metrics trackers tracker_project
    validation_prompts validation_images validation_at_start validation_every validation_steps validation_guidance
    validation_size validation_frames validation_lossless
    evaluation_every evaluation_data evaluation_examples push_to_hub hub_model_id
"""
"""Of `model`, `transformer`, `data` and `datasets` the content is compared: the base model's weights below, the data by
the loader. An average of the weights (`ema_decay`) cannot be added or removed. The number of examples per step must be
the same."""
SETTINGS = {
    **dict.fromkeys(_REFUSED.split(), Resumed.REFUSED),
    **dict.fromkeys(_GIVEN.split(), Resumed.GIVEN),
    "adapter_init": Resumed.KEPT,  # "olora" also changed the base model, which the checkpoint restores
}
"""Policy of every setting of `TrainConfig`."""

_WITH_MODEL = ("targets", "num_frames")
"""Settings whose default depends on the model; they are compared after it is loaded."""
_FACTS = {
    "family": "The model is of another family.",
    "base": "The base model has other weights.",
}
"""Fields of `Facts` that must be equal, with the message if they are not."""

ANEW = "start anew with another --output_dir"


class Facts(NamedTuple):
    """Properties of the loaded model, stored in a checkpoint."""

    family: str
    """Class name of the family."""
    base: str
    """Fingerprints of the weights of all trained transformers without the adapter."""
    targets: list[str]
    num_frames: list[int]


def facts_of(config: TrainConfig, family: Family) -> Facts:
    """The facts about a model. Call it before the adapter is added."""
    targets = sorted(config.targets or family.lora_targets)
    base = " ".join(fingerprint(each, rounded=True) for each in family.trained.values())
    return Facts(type(family).__name__, base, targets, list(buckets_of(config, family).frames))


def settings_of(config: TrainConfig, dp_degree: int) -> dict[str, Any]:
    """The settings as a checkpoint stores them: JSON values, with defaults that depend on other settings resolved."""
    examples = config.batch_size * config.gradient_accumulation_steps * dp_degree
    resolved = {
        # Between bfloat16 and float32, a run may change.
        "base_precision": config.base_precision if config.base_precision in QUANTISED else None,
        "alpha": config.alpha or (None if config.adapter in WITHOUT_ALPHA else float(config.rank)),
        "aspects": config.aspects or ASPECTS,
        "learning_rate": config.rate,
        "lr_warmup_steps": config.warmup_steps,
        "resume": None,
        "overwrite": False,
        "dry_run": False,
    }
    found: dict[str, Any] = json.loads(json.dumps({**config.as_dict(), **resolved, "examples of a step": examples}))
    return found


def write_settings(folder: Path, settings: Mapping[str, Any], facts: Facts) -> None:
    """Writes the settings and facts into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps({**settings, "facts": facts._asdict()}, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings that `write_settings` wrote.

    Raises:
        TrainingError: the file is missing or cannot be read.
    """
    try:
        settings = read_json(folder / FILE)
        if not isinstance(settings, dict) or not isinstance(settings["facts"], dict):
            raise ValueError("no settings")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"--resume: {folder / FILE} cannot be read ({type(error).__name__}: {error}). Resume from another "
            f"checkpoint, or {ANEW}."
        ) from error
    return settings


def resume_settings(config: TrainConfig, before: Mapping[str, Any], dp_degree: int) -> tuple[TrainConfig, list[str]]:
    """Compares settings with those of a checkpoint.

    Args:
        config: the settings of this run.
        before: the checkpoint's settings, from `read_settings`.
        dp_degree: number of data-parallel groups.

    Returns:
        The settings to resume with, and a line for each that differs.

    Raises:
        TrainingError: settings differ that must be equal. The message names all of them.
    """
    now = settings_of(config, dp_degree)
    kept, lines, refused = {}, [], []
    for name, policy in SETTINGS.items():
        if name not in before or name in _WITH_MODEL or now[name] == before[name]:
            continue  # (a checkpoint of an older version may lack a setting)
        if policy is Resumed.KEPT:
            kept[name] = before[name]
            lines.append(f"{option(name, before[name])} from the checkpoint, instead of {_value(now[name])}")
        elif policy is Resumed.GIVEN:
            lines.append(f"{option(name, now[name])}, until now {_value(before[name])}")
        else:
            refused.append((name, now[name], before[name]))
    if refused:
        here, there = ([option(name, each[i]) for name, *each in refused] for i in range(2))
        raise _refusal(here, there)
    if (now["ema_decay"] is None) != (before.get("ema_decay") is None):
        raise TrainingError(
            f"{option('ema_decay', now['ema_decay'])}: the checkpoint is from a run with "
            f"{option('ema_decay', before.get('ema_decay'))}. An average cannot be added or removed later. Give the "
            f"same as before, or {ANEW}."
        )
    _check_examples(config, before.get("examples of a step"), dp_degree)
    return dataclasses.replace(config, **kept), lines


def _refusal(here: list[str], there: list[str]) -> TrainingError:
    return TrainingError(
        f"{', '.join(here)}: the checkpoint is from a run with {', '.join(there)}, and can only be resumed with that. "
        f"Give {' '.join(there)}, or {ANEW}."
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
        f"{dp_degree} {groups} are {now} examples per step, but the checkpoint is from a run with {before}. "
        f"{advice}, or {ANEW}."
    )


def check_facts(facts: Facts, before: Mapping[str, Any]) -> None:
    """Compares the loaded model with the checkpoint's.

    Args:
        facts: from `facts_of`.
        before: the checkpoint's settings, from `read_settings`.

    Raises:
        TrainingError: the model differs, or its adapter is for other layers.
    """
    kept = before["facts"]
    for name, what in _FACTS.items():
        if name in kept and getattr(facts, name) != kept[name]:
            raise TrainingError(
                f"{what} The checkpoint is from a run with {option('model', before.get('model'))}. Give that model, or "
                f"{ANEW}."
            )
    for name in _WITH_MODEL:
        here = getattr(facts, name)
        if kept.get(name, here) != here:
            raise _refusal([option(name, here)], [option(name, kept[name])])


def check_steps(steps: int, step: int, others: list[int]) -> None:
    """Raises TrainingError if a checkpoint has more steps than the run.

    Args:
        steps: number of steps of the run.
        step: step of the checkpoint.
        others: steps of all checkpoints, ascending.
    """
    if steps >= step:
        return
    before = [each for each in others if each <= steps]
    earlier = f", or resume from an earlier checkpoint: --resume {before[-1]}" if before else ""
    raise TrainingError(
        f"--steps {steps}: the checkpoint has {step} steps already. Give --steps {step} to write its adapter, a larger "
        f"number to continue{earlier}."
    )


def _value(value: Any) -> str:
    if value is None:
        return "the default"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
