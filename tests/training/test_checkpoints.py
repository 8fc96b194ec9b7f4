"""A run that is killed at any moment goes on where it was, to the weights that it would have had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffusers_attn.training.checkpoint import Checkpoints
from diffusers_attn.training.errors import TrainingError

from .runs import train_and_die, train_until_terminated

STEPS = {"steps": 6, "checkpoint_every": 1, "checkpoints_kept": 2, "ema_decay": 0.9, "batch_size": 1}


@pytest.fixture(scope="module")
def whole(settings_of, forked, tmp_path_factory):
    """An uninterrupted run: its settings, what it said, and its weights."""
    answer = tmp_path_factory.mktemp("whole") / "answer"
    settings = settings_of("cogview4", **STEPS)
    assert forked(train_and_die, settings, None, str(answer)) == 0
    result = json.loads(answer.read_text())
    return result, load_file(result["path"])


def finish(settings, forked, folder):
    """Goes on to the end. Returns what was said of the steps, and the weights."""
    answer = folder / "answer"
    assert forked(train_and_die, {**settings, "resume": "latest"}, None, str(answer)) == 0
    result = json.loads(answer.read_text())
    metrics = [json.loads(line) for line in Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in metrics] == [*range(1, settings["steps"] + 1)]
    return result["steps"], load_file(result["path"])


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("share", [0.02, 0.37, 0.53, 0.71, 0.97])
def test_killed_while_checkpoints_change(whole, settings_of, forked, tmp_path, share):
    result, weights = whole
    settings = settings_of("cogview4", **STEPS)
    event = max(1, round(result["changes"] * share))
    assert forked(train_and_die, settings, event, str(tmp_path / "answer")) == -9
    steps, resumed = finish(settings, forked, tmp_path)
    assert steps == result["steps"][6 - len(steps) :]
    assert len(steps) == 6 or share > 0.1
    assert same(resumed, weights)
    left = {path.name for path in Path(settings["output_dir"], "checkpoints").iterdir()}
    assert left == {"step-00000005", "step-00000006"}


def test_terminated(whole, settings_of, forked, tmp_path):
    result, weights = whole
    settings = settings_of("cogview4", **{**STEPS, "checkpoint_every": 0})
    assert forked(train_until_terminated, settings, 3) == 0
    steps, resumed = finish(settings, forked, tmp_path)
    assert steps == result["steps"][-2:]  # the step in which it is told is the next one
    assert same(resumed, weights)


def test_what_is_unfinished_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)

    def fail(folder):
        (folder / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        checkpoints.save(1, fail)
    assert checkpoints.newest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, lambda folder, step=step: (folder / "state").write_text(str(step)))
    assert checkpoints.steps() == [2, 10]
    assert (checkpoints.newest() / "state").read_text() == "10"
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.save(10, lambda folder: (folder / "state").write_text("again"))
    assert (checkpoints.newest() / "state").read_text() == "again"
    with pytest.raises(TrainingError, match="resume='3'"):
        checkpoints.find("3")
    assert checkpoints.find("2") == tmp_path / "step-00000002"
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [2]
