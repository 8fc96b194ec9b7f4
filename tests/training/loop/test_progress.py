"""Log entries of steps: their content, and the measured times."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from diffusers_attn.training.loop.progress import MetricsFile, Progress

NUMBERS = {"loss": 0.5, "learning rate": 1e-4, "gradient norm": 1.0}


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def accelerator():
    """With a tracker that keeps its entries."""
    kept = []

    def log(values, step):
        kept.append({"step": step, **values})

    return SimpleNamespace(is_main_process=True, device=torch.device("cpu"), log=log, kept=kept)


def test_a_resumed_run_goes_on_in_its_file(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write(step, {"loss": step / 10})
        assert [each["step"] for each in entries(path)][-1] == step  # at once: it may be killed any time
    path.write_text(path.read_text() + '{"step": 4, "lo')  # as it was
    file = MetricsFile(path, 2)
    file.write(3, {"loss": 0.9})
    file.close()
    assert entries(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 0.9}]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    MetricsFile(path, 0).close()
    assert path.read_text() == ""  # another run


def test_entries(tmp_path, accelerator):
    path = tmp_path / "metrics.jsonl"
    progress = Progress(accelerator, steps=4, first=0, every=2, metrics=path)
    for step in (1, 2, 3, 4):
        progress.step(step, NUMBERS, tokens=100, seconds=0.4 + 0.2 * (step % 2))
    progress.log(4, {"evaluation/loss": 0.1})
    progress.close()
    assert entries(path) == accelerator.kept
    assert [each["step"] for each in entries(path)] == [2, 4, 4]
    for entry in entries(path)[:2]:
        assert entry.keys() == {"step", *NUMBERS, "seconds per step", "tokens per second", "memory GB"}
        assert entry["seconds per step"] == pytest.approx(0.5)
        assert entry["tokens per second"] * entry["seconds per step"] == pytest.approx(100)


def test_one_process_writes(tmp_path, accelerator):
    accelerator.is_main_process = False
    progress = Progress(accelerator, steps=1, first=0, every=1, metrics=tmp_path / "metrics.jsonl")
    progress.step(1, NUMBERS, tokens=100, seconds=0.5)
    progress.close()
    assert not list(tmp_path.iterdir())
