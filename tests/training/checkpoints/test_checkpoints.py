"""A run that is killed at any moment goes on where it was, to the weights that it would have had."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_attn.training.checkpoints.checkpoint import Checkpoints
from diffusers_attn.training.checkpoints.resuming import Facts
from diffusers_attn.training.checkpoints.state import TrainingSnapshot, restore, write
from diffusers_attn.training.errors import TrainingError

from ..runs import train_and_die, train_until_terminated

STEPS = {"steps": 6, "checkpoint_every": 1, "checkpoints_kept": 2, "ema_decay": 0.9, "batch_size": 1}


@pytest.fixture(scope="module")
def uninterrupted(settings_of, forked, tmp_path_factory):
    """An uninterrupted run: its settings, its log, and its weights."""
    answer = tmp_path_factory.mktemp("whole") / "answer"
    settings = settings_of("cogview4", **STEPS)
    assert forked(train_and_die, settings, None, str(answer)) == 0
    result = json.loads(answer.read_text())
    return result, load_file(result["path"])


def finish(settings, forked, folder):
    """Runs to the end. Returns the logged steps and the weights."""
    answer = folder / "answer"
    assert forked(train_and_die, {**settings, "resume": "latest"}, None, str(answer)) == 0
    result = json.loads(answer.read_text())
    metrics = [json.loads(line) for line in Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in metrics] == [*range(1, settings["steps"] + 1)]
    return result["steps"], load_file(result["path"])


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("share", [0.02, 0.37, 0.53, 0.71, 0.97])
def test_killed_while_checkpoints_change(uninterrupted, settings_of, forked, tmp_path, share):
    result, weights = uninterrupted
    settings = settings_of("cogview4", **STEPS)
    event = max(1, round(result["changes"] * share))
    assert forked(train_and_die, settings, event, str(tmp_path / "answer")) == -9
    steps, resumed = finish(settings, forked, tmp_path)
    assert steps == result["steps"][6 - len(steps) :]
    assert len(steps) == 6 or share > 0.1
    assert same(resumed, weights)
    left = {path.name for path in Path(settings["output_dir"], "checkpoints").iterdir()}
    assert left == {"step-00000005", "step-00000006"}


def test_terminated(uninterrupted, settings_of, forked, tmp_path):
    result, weights = uninterrupted
    settings = settings_of("cogview4", **{**STEPS, "checkpoint_every": 0})
    assert forked(train_until_terminated, settings, 3) == 143
    steps, resumed = finish(settings, forked, tmp_path)
    assert steps == result["steps"][-2:]  # it ends with the step after the signal
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
        checkpoints.save(step, lambda folder, step=step: (folder / "state.json").write_text(str(step)))
    assert checkpoints.steps() == [2, 10]
    assert (checkpoints.newest() / "state.json").read_text() == "10"
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.save(10, lambda folder: (folder / "state.json").write_text("again"))
    assert (checkpoints.newest() / "state.json").read_text() == "again"
    with pytest.raises(TrainingError, match="resume='3'"):
        checkpoints.find("3")
    assert checkpoints.find("2") == tmp_path / "step-00000002"
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [2]


def _folder(tmp_path, steps=(1, 2)):
    """Checkpoints with two files each."""
    checkpoints = Checkpoints(tmp_path, keep=None)

    def write(folder):
        (folder / "state.json").write_text("{}")
        (folder / "optimizer.safetensors").write_bytes(bytes(range(256)) * 10)

    for step in steps:
        checkpoints.save(step, write)
    return checkpoints


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_another_offered(tmp_path, damage):
    checkpoints = _folder(tmp_path)
    path = checkpoints.path(2) / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[1000] ^= 4
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path = checkpoints.path(2) / "checksums.json"
        path.write_text("{") if damage == "manifest" else path.unlink()
    for wanted in ("latest", "2", str(checkpoints.path(2))):
        with pytest.raises(TrainingError, match="is damaged: .*--resume 1") as error:
            checkpoints.find(wanted)
        assert str(path) in str(error.value)
    with pytest.raises(TrainingError, match=f"--resume {re.escape(str(checkpoints.path(1)))}"):
        Checkpoints(tmp_path / "own", keep=None).find(str(checkpoints.path(2)))
    assert checkpoints.find("1") == checkpoints.path(1)
    (checkpoints.path(1) / "state.json").write_text("")
    with pytest.raises(TrainingError, match="no other undamaged checkpoint: start anew"):
        checkpoints.find("latest")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": -1}, "step is -1, but a whole number from 0"),
        ({"step": "2"}, "step is '2'"),
        ({"step": 3}, "is from step 3, but its folder is named for another step"),
        ({"step": True}, "step is True"),
        ({"average_steps": 0.5}, "average_steps is 0.5"),
        ({"loader": {"epoch": 0, "position": -4, "batches": "a"}}, "loader.position is -4"),
        ({"loader": []}, "is damaged: "),
        ({"format": 1}, "has format 1, but this version"),
        (None, "'step' is missing"),
    ],
)
def test_a_state_that_cannot_be_meant_is_refused(tmp_path, change, message):
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    state = {"format": 3, "step": 2, "average_steps": 0, "loader": {"epoch": 0, "position": 2, "batches": "a"}}
    (folder / "state.json").write_text(json.dumps({"format": 3} if change is None else {**state, **change}))
    with pytest.raises(TrainingError, match=message) as error:
        restore(None, folder)
    assert str(folder / "state.json") in str(error.value)


@pytest.mark.parametrize("what", ["adapter", "optimizer", "state"])
def test_a_disk_that_will_not_have_it(tmp_path, what):
    """Files may have so many bytes only, which safetensors, torch.save and Python each report in their own way."""
    weights = {f"layer{i}": torch.ones(10_000) for i in range(2)}
    few = {"layer": torch.ones(1)}
    batches = {"batches": "x" * (100_000 if what == "state" else 1)}
    taken = TrainingSnapshot(
        1,
        weights if what == "adapter" else few,
        None,
        0,
        {"state": weights if what == "optimizer" else few},
        {"epoch": 0, "position": 0, **batches},
        {"steps": 1},
        Facts("Flux", "", [], []),
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)
    checkpoints.save(1, lambda folder: write(taken, folder), taken.size)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError) as error:
            checkpoints.save(2, lambda folder: write(taken, folder), taken.size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    assert checkpoints.find("latest") == checkpoints.path(1)
    message = str(error.value)
    assert f"the checkpoint of step 2 could not be written to {checkpoints.path(2)}: " in message
    assert re.search(r"It needs \S+ (bytes|kB)\. \S+ [kMGT]B are free there\.", message)
    assert f"The previous checkpoint, {checkpoints.path(1)}, is complete" in message
