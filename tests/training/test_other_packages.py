"""Runs with optimizers and trackers of other packages, and that they resume exactly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_attn.training.checkpoints import tensors_and_values

from .runs import train
from .worlds import forget_accelerate


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def _needs(package):
    """Skips where a package is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e .[test]")


@pytest.mark.parametrize(("optimizer", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_optimizer_goes_on_exactly(settings_of, optimizer, package):
    _needs(package)
    # Of matrices with fewer than 4096 entries, bitsandbytes keeps the state in float32.
    settings = {"steps": 4, "optimizer": optimizer, "checkpoint_every": 2, "rank": 128, "learning_rate": None}
    uninterrupted = train(settings_of("cogview4", **settings))
    checkpoint = Path(uninterrupted["path"]).parent / "checkpoints" / "step-00000002"
    kept = tensors_and_values.read(checkpoint / "optimizer")["state"]
    assert len(kept) > 10 and _dtypes(kept) == (
        {torch.uint8, torch.float32} if package == "bitsandbytes" else {torch.float32}
    )
    forget_accelerate()
    resumed = train(settings_of("cogview4", **settings, resume=str(checkpoint)))
    assert resumed["steps"] == uninterrupted["steps"][2:]
    ours, theirs = load_file(resumed["path"]), load_file(uninterrupted["path"])
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def _dtypes(kept):
    """Of all tensors in it that are not numbers."""
    if isinstance(kept, torch.Tensor):
        return {kept.dtype} if kept.ndim else set()
    return {dtype for each in kept.values() for dtype in _dtypes(each)} if isinstance(kept, dict) else set()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_is_told_numbers_and_videos(settings_of, tmp_path, monkeypatch, tracker):
    _needs(tracker)
    if tracker == "wandb":  # reads its environment once per process
        importlib.import_module("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    drawing = {"validation_prompts": ["a cat"], "validation_steps": 1}
    settings = settings_of("wan", steps=3, trackers=[tracker], tracker_project="tried", **drawing)
    train({**settings, "cache_dir": f"{settings['output_dir']}/cache"})
    if tracker == "wandb":
        importlib.import_module("wandb").teardown()  # waits for the process that writes the records
        [run] = tmp_path.glob("wandb/offline-run-*")
        [records] = run.glob("run-*.wandb")
        videos = [each.read_bytes() for each in run.glob("files/media/videos/validation/*")]
        assert len(videos) == 2  # before the first step, and at the end
        assert Path(settings["output_dir"], "samples", "last", "00-a-cat.mp4").read_bytes() in videos
    else:
        [records] = Path(settings["output_dir"], "tried").glob("events.out.tfevents.*")
        assert b"validation/0" in records.read_bytes()
    for number in (b"loss", b"gradient norm", b"learning rate"):
        assert records.read_bytes().count(number) >= settings["steps"], number
