"""Ctrl-C and SIGTERM end a run with a checkpoint, on all processes, and with an exit code that says so."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from diffusers_attn.training import TrainConfig, Trainer
from diffusers_attn.training.checkpoints.checkpoint import Checkpoints
from diffusers_attn.training.errors import TrainingInterrupted
from diffusers_attn.training.loop.interruption import interruptible

from ..runs import command_line, run_script, train_until_terminated
from ..worlds import World


def steps_of(settings):
    return Checkpoints(Path(settings["output_dir"], "checkpoints"), None).steps()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_script_saves_and_says_how_to_go_on(settings_of, forked, tmp_path, number, code):
    settings = settings_of("cogview4", steps=400, metrics=True)
    metrics = str(Path(settings["output_dir"], "metrics.jsonl"))
    assert forked(run_script, command_line(settings), str(tmp_path), int(number), metrics) == code
    log = (tmp_path / "output").read_text()
    [step] = steps_of(settings)
    assert 1 <= step < 400
    assert "Interrupt again to exit at once" in log
    assert f"interrupted by {number.name}; resume from {settings['output_dir']}" in log
    assert "Traceback" not in log
    again = {**settings, "steps": step, "resume": "latest"}
    assert forked(run_script, command_line(again), str(tmp_path)) == 0
    log = (tmp_path / "output").read_text()
    assert log.count(f"resuming from {settings['output_dir']}/checkpoints/step-{step:08d}") == 1
    assert log.count(f"--steps {step}, until now 400") == 1
    assert Path(settings["output_dir"], "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_leaves_at_once(settings_of, forked, number):
    settings = settings_of("cogview4", steps=4)
    assert forked(train_until_terminated, settings, 2, number, number) == 128 + number
    assert steps_of(settings) == []


def test_what_a_launcher_passes_on_is_no_second_one(monkeypatch):
    """A terminal sends Ctrl-C to it and to its processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as asked:
        assert asked() == 0
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # which would end pytest
            pytest.fail("the second was not taken for the first")
        assert asked() == signal.SIGINT
        monkeypatch.setattr("diffusers_attn.training.loop.interruption.FORWARDED", 0.0)
        with pytest.raises(TrainingInterrupted) as left:
            os.kill(os.getpid(), signal.SIGINT)
    assert left.value.exit_code == 130 and left.value.checkpoint is None
    assert signal.getsignal(signal.SIGINT) is before


def _one_is_signalled(settings):
    """Only the second process, when it has read the numbers of the second step."""

    def tell(number, _):
        if number == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)

    try:
        Trainer(TrainConfig(**settings), on_step=tell).run()
    except TrainingInterrupted as interruption:
        return interruption.signal, str(interruption.checkpoint)
    return None


def test_all_processes_leave_behind_the_same_step(run_worlds, settings_of):
    settings = settings_of("cogview4", steps=8, cp_degree=2)
    [answers] = run_worlds(World(2, _one_is_signalled, {"settings": settings}))
    # The third step is launched already. The fourth exchanges the signal, which is read when the fifth is launched.
    assert steps_of(settings) == [5]
    path = f"{settings['output_dir']}/checkpoints/step-00000005"
    assert answers == [(signal.SIGINT, path), (signal.SIGINT, path)]


def _signalled_while_drawing(settings):
    """The first process, as soon as the first of three pictures is there."""

    def tell():
        folder = Path(settings["output_dir"], "samples", "step-00000001")
        while not list(folder.glob("*.png")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    if os.environ.get("RANK", "0") == "0":
        threading.Thread(target=tell, daemon=True).start()
    try:
        Trainer(TrainConfig(**settings)).run()
    except TrainingInterrupted as interruption:
        return str(interruption.checkpoint)
    return None


def test_while_pictures_are_drawn_the_rest_is_left_out(run_worlds, settings_of):
    prompts = [f"number {i}" for i in range(12)]
    drawing = {"validation_prompts": prompts, "validation_every": 1, "validation_steps": 12}
    settings = settings_of("cogview4", steps=3, cp_degree=2, gradient_accumulation_steps=1, **drawing)
    [answers] = run_worlds(World(2, _signalled_while_drawing, {"settings": settings}))
    assert answers == [f"{settings['output_dir']}/checkpoints/step-00000001"] * 2
    assert steps_of(settings) == [1]
    assert 1 <= len(list(Path(settings["output_dir"], "samples", "step-00000001").glob("*.png"))) < len(prompts)
