"""The host runs ahead of the device: steps are launched without waiting, and their numbers are read one step later."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_attn.training import TrainConfig, Trainer
from diffusers_attn.training.loop import set_up
from diffusers_attn.training.loop.train_step import TrainStep
from diffusers_attn.training.transfers import ToHost, to_device

from ...marks import thorough_but
from ..runs import QUICK
from ..worlds import forget_accelerate

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select)
"""What waits for a device: a number of a tensor, as by `float` and `tolist`, and results of unknown size."""
INDEXING = (aten.index, aten.index_put, aten.index_put_)
"""What waits for a device if an index is a mask."""
OF_MODELS = {"qwen_image": "its position embedding", "z_image": "its padding"}
"""Families whose forward in diffusers waits for the device."""


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


class Reads(TorchDispatchMode):
    """Lists operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [each for each in args[1] if each is not None] if func.overloadpacket in INDEXING else []
        if func.overloadpacket in READS or any(each.dtype is torch.bool for each in masks):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", thorough_but(("flux", "wan"), [each for each in QUICK if each not in OF_MODELS]))
def test_a_step_reads_nothing(settings_of, monkeypatch, name):
    """All captions have the same length, since those of others are divided by their lengths, which the host has."""
    call, reads = TrainStep.__call__, []

    def watched(self, micros):
        batch = [next(micros) for _ in range(self.config.gradient_accumulation_steps)]
        with Reads() as found:
            done = call(self, iter(batch))
        reads.append(found.found)
        return done

    monkeypatch.setattr(TrainStep, "__call__", watched)
    make = set_up.make_optimizer  # on CPUs it reads its own count of steps, unless it is fused as on GPUs
    monkeypatch.setattr(set_up, "make_optimizer", lambda *a, **named: make(*a, **{**named, "fused": True}))
    Trainer(TrainConfig(**settings_of(name, steps=3, ema_decay=0.9))).run()
    assert len(reads) == 3 and reads[0] and reads[1:] == [[], []]  # the first compares batches


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox", "sdxl"])
def test_a_step_does_not_wait_for_the_gpu(settings_of, monkeypatch, name):
    """Neither for numbers nor for copies, of which a CPU knows nothing."""
    call, steps = TrainStep.__call__, []

    def watched(self, micros):
        batch = [next(micros) for _ in range(self.config.gradient_accumulation_steps)]
        steps.append(len(batch))
        torch.cuda.set_sync_debug_mode(
            "error" if len(steps) > 2 else "default"
        )  # kernels are loaded and batches compared
        try:
            return call(self, iter(batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainStep, "__call__", watched)
    settings = {"steps": 5, "cpu": False, "mixed_precision": "bf16", "ema_decay": 0.9}
    Trainer(TrainConfig(**settings_of(name, **settings))).run()
    assert len(steps) == 5


def test_numbers_are_read_when_the_next_step_is_launched(settings_of, monkeypatch):
    """Not where a checkpoint, an evaluation or samples follow: they are of this step, and come after it is checked."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("diffusers_attn.training.transfers.time", SimpleNamespace(perf_counter=lambda: clock.now))
    events = []
    launch, read = Trainer._launch, Trainer._read

    def slow(self, *given):
        events.append(f"launch {self.step + 1}")
        clock.now += 0.5
        return launch(self, *given)

    def save(self):
        events.append(f"save {self.step}")
        clock.now += 5

    monkeypatch.setattr(Trainer, "_launch", slow)
    monkeypatch.setattr(Trainer, "_read", lambda self, done: events.append(f"read {done.step}") or read(self, done))
    monkeypatch.setattr(Trainer, "_save", save)
    settings = settings_of("cogview4", steps=5, gradient_accumulation_steps=1, checkpoint_every=3, metrics=True)
    logged = []
    Trainer(TrainConfig(**settings), on_step=lambda step, numbers: logged.append(step)).run()
    assert events == [
        *("launch 1", "launch 2", "read 1", "launch 3", "read 2", "read 3", "save 3"),
        *("launch 4", "launch 5", "read 4", "read 5", "save 5"),
    ]
    lines = Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert logged == [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    # What comes between steps is not theirs, and steps that are read together have a time each.
    assert [entry["seconds per step"] for entry in entries] == [pytest.approx(0.5)] * 5


def test_copies():
    assert ToHost(torch.tensor([1.0, 2.5])).read() == [1.0, 2.5]
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert to_device(torch.tensor([[3.0]]), like).equal(torch.tensor([[3.0]], dtype=torch.bfloat16))


def test_reads_are_found():
    """The check above finds what it looks for."""
    with Reads() as reads:
        float(torch.ones(()))
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(reads.found) == 2
