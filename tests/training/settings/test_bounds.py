"""Every numeric setting states its interval, and other values are refused before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import typing

import pytest

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.settings.bounds import BELOW_ONE, COUNT, Bounds
from diffusers_attn.training.settings.contradictions import check_effect
from diffusers_attn.training.settings.flag_names import option
from diffusers_attn.training.settings.setting import metadata_of

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
HINTS = typing.get_type_hints(TrainConfig)
MUST = {"model": "m", "data": "d"}


def number_of(hint):
    """The type of a setting's numbers; None where it has none."""
    kinds = {hint, *typing.get_args(hint), *(each for part in typing.get_args(hint) for each in typing.get_args(part))}
    return next((kind for kind in (int, float) if kind in kinds), None)


NUMBERS = {name: kind for name, hint in HINTS.items() if (kind := number_of(hint)) is not None}


def test_every_number_has_bounds():
    assert len(NUMBERS) > 40
    assert {name for name, field in FIELDS.items() if metadata_of(field).bounds is not None} == set(NUMBERS)


def outside(bounds):
    """Numbers beside each end of an interval."""
    yield bounds.low - 1
    yield bounds.high + 1
    if not bounds.low_is_in:
        yield bounds.low
    if not bounds.high_is_in:
        yield bounds.high


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_out_of_bounds_is_refused(name):
    field = FIELDS[name]
    wrong = [*outside(metadata_of(field).bounds), math.nan, math.inf, -math.inf, "1", True]
    if NUMBERS[name] is int:
        wrong.append(1.5)
    for each in wrong:
        value = [each] * (metadata_of(field).length or 1) if "list" in str(HINTS[name]) else each
        with pytest.raises(TrainingError, match=f"--{name}"):
            TrainConfig(**MUST, **{name: value})


@pytest.mark.parametrize("name", [name for name in NUMBERS if "list" in str(HINTS[name])])
def test_so_are_other_numbers_of_numbers(name):
    field = FIELDS[name]
    for length in (0, 3) if metadata_of(field).length else (0,):
        with pytest.raises(TrainingError, match=f"--{name}"):
            TrainConfig(**MUST, **{name: [0.5] * length})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 10, "lr_warmup_steps": 11}, "--lr_warmup_steps 11 with --steps 10"),
        ({"lr_schedule": "constant", "lr_warmup_steps": 1}, "--lr_schedule constant, which has no warm-up"),
        ({"learning_rate": 0.1, "weight_decay": 10.0}, "--weight_decay 10.0 with a learning rate of 0.1"),
        ({"adapter_init": "orthogonal", "rank": 5}, "--adapter_init orthogonal with --rank 5: it needs an even rank"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**MUST, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"timestep_sampling": "uniform", "logit_mean": 0.5},
            "--logit_mean 0.5 has no effect with --timestep_sampling",
        ),
        (
            {"timestep_sampling": "uniform", "logit_std": 2.0},
            ".*Leave it out, or give --timestep_sampling logit_normal",
        ),
        ({"timestep_sampling": "logit_normal", "mode_scale": 1.0}, "--mode_scale 1.0 has no effect with --timestep_s"),
        ({"tracker_project": "p"}, "--tracker_project p has no effect without --trackers. Leave it out, or give --tra"),
        ({"validation_size": [64, 64]}, "--validation_size 64 64 has no effect without --validation_prompts"),
        ({"evaluation_examples": 8}, "--evaluation_examples 8 has no effect without --evaluation_every"),
        ({"hub_model_id": "me/it"}, "--hub_model_id me/it has no effect without --push_to_hub"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**MUST, **settings)


def test_settings_that_have_an_effect_with_the_model_only():
    config = TrainConfig(**MUST, logit_mean=0.5)  # the model decides what is sampled from
    check_effect(config, timestep_sampling="logit_normal")
    with pytest.raises(TrainingError, match="--logit_mean 0.5 has no effect with --timestep_sampling uniform"):
        check_effect(config, timestep_sampling="uniform")


def test_warm_up_where_nothing_is_said():
    steps = {"steps": 1000}, {"steps": 100}, {"steps": 4}, {"steps": 100, "lr_schedule": "constant"}
    assert [TrainConfig(**MUST, **each).warmup_steps for each in steps] == [50, 10, 0, 0]
    assert TrainConfig(**MUST, steps=4, lr_warmup_steps=4).warmup_steps == 4


def test_bounds_in_words():
    assert str(COUNT) == "from 1, up to 2147483647"
    assert str(BELOW_ONE) == "from 0, below 1"
    assert str(Bounds(0, 2.5, low_is_in=False)) == "above 0, up to 2.5"
    assert 10**400 not in COUNT and 1 in COUNT and 0 not in COUNT


def test_a_message_is_short_and_in_the_words_of_the_command_line():
    output = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(output):
        TrainConfig.from_arguments(["--model", "m", "--data", "d", "--max_grad_norm", "-1"], prog="train_lora.py")
    assert left.value.code == 2
    assert output.getvalue().splitlines() == [
        "train_lora.py: --max_grad_norm -1.0: numbers from 0, up to 2147483647 are accepted.",
        "All settings: train_lora.py --help",
    ]
    assert option("adam_betas", [2, 3]) == "--adam_betas 2 3"
    assert option("metrics", False) == "--no-metrics"
    assert option("targets", [".*to_q"]) == "--targets '.*to_q'"
    assert option("shift", None) == "no --shift"
