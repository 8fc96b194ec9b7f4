"""An output folder admits one run at a time, and keeps the files of earlier runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.checkpoints.output import check_output, output_of_this_run
from diffusers_attn.training.data.lock import FolderLock, alone_in
from diffusers_attn.training.data.ranks import OneRank, OtherRankError

from ...launching import TIMEOUT
from ..data.test_cache import on_threads
from ..worlds import forget_accelerate


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def hold(folder, ready):
    """Has the lock until it is killed."""
    lock = FolderLock(folder)
    assert lock.acquire()
    ready.write_text(str(os.getpid()))
    time.sleep(3600)


@pytest.fixture
def other(tmp_path, forked_in_background):
    """A process that has the lock of a folder."""
    ready = tmp_path / "ready"
    process = forked_in_background(hold, tmp_path / "folder", ready)
    while not ready.exists():
        time.sleep(0.02)
        assert process.is_alive()
    return process


def test_a_second_run_is_refused_with_who_has_the_folder(tmp_path, other):
    for error in on_threads(2, lambda ranks: _enter(tmp_path / "folder", ranks)):
        if isinstance(error, OtherRankError):
            continue
        assert isinstance(error, TrainingError)
        message = f"is in use by another run: process {other.pid} on host {socket.gethostname()}, since 20"
        assert message in str(error)
    # However the first one ends, the folder is free then.
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with output_of_this_run(tmp_path / "folder", OneRank()):
        assert not FolderLock(tmp_path / "folder").acquire()
    with output_of_this_run(tmp_path / "folder", OneRank()):
        pass


def _enter(folder, ranks):
    with output_of_this_run(folder, ranks):
        return "in"


def test_ranks_of_a_job_have_it_together(tmp_path):
    assert on_threads(3, lambda ranks: _enter(tmp_path / "folder", ranks)) == ["in"] * 3


def test_a_cache_is_waited_for(tmp_path, other, caplog):
    def end_the_other():
        until = time.monotonic() + TIMEOUT
        while "waiting" not in caplog.text and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(other.pid, signal.SIGKILL)

    def work(ranks):
        with alone_in(tmp_path / "folder", ranks, "the cache"):
            return "in"

    threading.Thread(target=end_the_other, daemon=True).start()
    assert on_threads(2, work) == ["in"] * 2
    assert f"is being filled by process {other.pid} on host" in caplog.text and caplog.text.count("waiting") == 1


def test_a_folder_that_cannot_be_locked_fails_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    errors = on_threads(2, lambda ranks: _enter(tmp_path / "file", ranks))
    assert "cannot be locked" in str(errors[0]) and isinstance(errors[1], OtherRankError)

    def work(ranks):
        with alone_in(tmp_path / "file", ranks, "the cache"):
            pass

    errors = on_threads(2, work)
    assert isinstance(errors[0], OSError) and isinstance(errors[1], OtherRankError)


@pytest.mark.parametrize("name", ["README.md", "pytorch_lora_weights.safetensors", "adapter_config.json", "samples"])
def test_files_of_before_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainingError, match=f"already has {name}, .*--overwrite"):
        check_output(tmp_path, own=False, overwrite=False)
    check_output(tmp_path, own=True, overwrite=False)
    check_output(tmp_path, own=False, overwrite=True)


def test_a_run_that_came_to_nothing_is_begun_again(tmp_path):
    with output_of_this_run(tmp_path, OneRank()):
        (tmp_path / "metrics.jsonl").write_text("")
    check_output(tmp_path, own=False, overwrite=False)


def test_a_run_over_what_was_there(settings_of):
    settings = settings_of("cogview4", steps=1, gradient_accumulation_steps=1)
    output = Path(settings["output_dir"])
    output.mkdir()
    (output / "README.md").write_text("mine")
    with pytest.raises(TrainingError, match="already has README.md"):
        Trainer(TrainConfig(**settings))
    forget_accelerate()
    Trainer(TrainConfig(**settings, overwrite=True)).run()
    assert "mine" not in (output / "README.md").read_text()
    # Its own files are no obstacle to going on, and are one to starting anew.
    forget_accelerate()
    Trainer(TrainConfig(**{**settings, "steps": 2, "resume": "latest"})).run()
    forget_accelerate()
    with pytest.raises(TrainingError, match="has checkpoints of an earlier run.*--overwrite"):
        Trainer(TrainConfig(**settings))
    forget_accelerate()
    Trainer(TrainConfig(**settings, overwrite=True)).run()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000001"]
    assert json.loads((output / "metrics.jsonl").read_text())["step"] == 1
