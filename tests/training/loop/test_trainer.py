"""A run: its files, its log, and its errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.data.decode import probe_video
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.source import FileSource

from ..runs import QUICK, train
from ..worlds import World


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_all_that_a_run_leaves(settings_of, tmp_path, capfd):
    settings = settings_of(
        "wan",
        steps=4,
        batch_size=1,
        ema_decay=0.5,
        checkpoint_every=2,
        validation_prompts=["a cat", "number 1"],
        validation_every=2,
        validation_steps=2,
        evaluation_every=2,
    )
    logged = []
    trainer = Trainer(TrainConfig(**settings), on_step=lambda step, numbers: logged.append((step, numbers)))
    path = trainer.run()
    output = Path(settings["output_dir"])
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert [numbers["learning rate"] for _, numbers in logged] == [0.0, 5e-4, 1e-3, 1e-3]
    log = capfd.readouterr().err
    assert "tok/s" in log and "evaluation loss" in log and "GB" in log
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in metrics] == [1, 2, 2, 3, 4, 4]  # two of them of evaluations
    losses = [each["loss"] for each in metrics if "loss" in each]
    assert losses == [numbers["loss"] for _, numbers in logged]

    averaged, last = load_file(path), load_file(output / "not_averaged" / path.name)
    assert path == output / "pytorch_lora_weights.safetensors"
    assert averaged.keys() == last.keys() and not all(averaged[name].equal(last[name]) for name in last)
    kept = load_file(output / "checkpoints" / "step-00000004" / "adapter.safetensors")
    assert sum(each.numel() for each in kept.values()) == sum(each.numel() for each in last.values())

    card = (output / "README.md").read_text()
    assert "text-to-video" in card and 'pipe.load_lora_weights("' in card and "samples/last/00-a-cat.mp4" in card
    for folder in ("step-00000000", "step-00000002", "last"):
        samples = sorted((output / "samples" / folder).glob("*.mp4"))
        assert [each.name for each in samples] == ["00-a-cat.mp4", "01-number-1.mp4"]
        # At the model's frame rate, to which the videos are resampled.
        assert [probe_video(FileSource(each))[:4] for each in samples] == [(48, 48, 9, 16.0)] * 2
    assert not list(output.rglob("*unfinished*"))

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with pytest.raises(TrainingError, match="output_dir=.*--resume latest"):
        Trainer(TrainConfig(**settings))


@pytest.mark.parametrize("adapter", ["dora", "lokr", "oft", "ia3"])
def test_other_adapters(settings_of, adapter):
    init = {} if adapter == "dora" else {"adapter_init": "default"}
    init |= {"rank": 16} if adapter == "ia3" else {}
    result = train(settings_of("cogview4", steps=2, adapter=adapter, lr_warmup_steps=0, **init))
    assert len({step["loss"] for step in result["steps"]}) == 2
    assert Path(result["path"]).is_file()


@pytest.mark.parametrize("name", QUICK)
def test_a_base_in_bfloat16(settings_of, name):
    settings = settings_of(name, steps=2, mixed_precision="bf16", gradient_accumulation_steps=1, lr_warmup_steps=0)
    drawing = {"validation_prompts": ["a cat"], "validation_steps": 1, "cache_dir": f"{settings['output_dir']}/cache"}
    trainer = Trainer(TrainConfig(**{**settings, **drawing}))
    weights = load_file(trainer.run())
    dtypes = {each.requires_grad: each.dtype for each in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {each.dtype for each in weights.values()} == {torch.float32}
    assert len(list(Path(settings["output_dir"], "samples", "last").glob("00-a-cat.*"))) == 1


def test_the_loss_goes_down(settings_of):
    settings = settings_of(
        "cogview4", steps=60, metrics=False, batch_size=4, gradient_accumulation_steps=1, caption_dropout=0.0
    )
    steps = train({**settings, "learning_rate": 1e-2, "rank": 16})["steps"]
    first, last = (sum(step["loss"] for step in part) / 10 for part in (steps[:10], steps[-10:]))
    assert last < 0.8 * first
    assert not Path(settings["output_dir"], "metrics.jsonl").exists()


def test_bad_data_is_named(settings_of, tmp_path):
    settings = settings_of("cogview4", steps=1)
    data = shutil.copytree(settings["data"], tmp_path / "data")
    (data / "0.png").write_bytes((data / "0.png").read_bytes()[:50])
    (data / "1.txt").unlink()
    (data / "lonely.txt").write_text("no picture")
    settings |= {"data": str(data)}
    with pytest.raises(TrainingDataError) as refused:
        train(settings)
    assert {"0.png", "1.png", "lonely.txt"} <= {problem.name for problem in refused.value.problems}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert len(train({**settings, "on_bad_data": "skip"})["steps"]) == 1


def _one_fails(settings):
    """The first process cannot save: there is a file where its folder would be."""
    if os.environ["RANK"] == "0":
        Path(settings["output_dir"]).mkdir()
        Path(settings["output_dir"], "checkpoints").write_text("")
    with pytest.raises((OSError, RuntimeError)) as failed:
        train(settings)
    return str(failed.value)


def test_a_failure_of_one_process_ends_all(run_worlds, settings_of):
    settings = settings_of("cogview4", steps=1, cp_degree=2)
    [[first, second]] = run_worlds(World(2, _one_fails, {"settings": settings}))
    assert "File exists" in first and "saving a checkpoint failed on another process" in second


def test_the_command_line():
    parsed = TrainConfig.from_arguments(
        ["--model", "m", "--data", "d", "--resolution", "256", "512", "--no-gradient_checkpointing", "--rank", "8"]
    )
    assert (parsed.resolution, parsed.gradient_checkpointing, parsed.rank, parsed.ema_decay) == (
        [256, 512],
        False,
        8,
        None,
    )
    assert json.dumps(parsed.as_dict())
    assert parsed == TrainConfig(model="m", data="d", resolution=[256, 512], gradient_checkpointing=False, rank=8)
    for arguments, message in (
        (["--data", "d"], "--model is missing. Pipeline to train"),
        (["--model", "m", "--data", "d", "--rank", "0"], "--rank 0: whole numbers from 1"),
        (["--model", "m", "--data", "d", "--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--model", "m", "--data", "d", "--ranks", "2"], "unrecognized arguments: --ranks 2. Did you mean '--rank'?"),
    ):
        log = io.StringIO()
        with pytest.raises(SystemExit), contextlib.redirect_stderr(log):
            TrainConfig.from_arguments(arguments)
        assert message in log.getvalue()
    assert "processes and attention:" in TrainConfig.parser().format_help()


@pytest.mark.slow
def test_compiled_blocks_train_alike(settings_of):
    """Each as one graph, also under DDP, which would otherwise cut it where its buckets of gradients end."""
    plain = train(settings_of("cogview4", steps=2, gradient_accumulation_steps=1, lr_warmup_steps=0))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    settings = settings_of("cogview4", steps=2, gradient_accumulation_steps=1, lr_warmup_steps=0, compile=True)
    cut = []
    config = TrainConfig(**settings)
    trainer = Trainer(config, on_step=lambda *step: cut.append((step, torch._dynamo.config.optimize_ddp)))
    trainer.run()
    assert [flag for _, flag in cut] == [False, False] and torch._dynamo.config.optimize_ddp
    for ((_, numbers), _), expected in zip(cut, plain["steps"]):
        assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert numbers["gradient norm"] == pytest.approx(expected["gradient norm"], rel=1e-4)


def test_adapter_dropout_needs_no_state(settings_of):
    """It draws from the global generator, which is seeded for every forward."""
    settings = {"steps": 4, "adapter_dropout": 0.5, "checkpoint_every": 2}
    uninterrupted = train(settings_of("cogview4", **settings))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    checkpoint = Path(uninterrupted["path"]).parent / "checkpoints" / "step-00000002"
    torch.rand(7)
    resumed = train(settings_of("cogview4", **settings, resume=str(checkpoint)))
    assert resumed["steps"] == uninterrupted["steps"][2:]
