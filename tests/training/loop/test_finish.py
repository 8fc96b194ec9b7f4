"""What a run saves: adapters that load as they are, and a picture of its losses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.loop.loss_plot import draw_losses, moving_average

from ..model.test_lora import pipeline_of
from ..worlds import forget_accelerate


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


def loaded(folder):
    """The adapter's weights in a pipeline that loads a folder."""
    pipeline = pipeline_of("flux")
    pipeline.load_lora_weights(str(folder), adapter_name="a")
    return {name: each for name, each in pipeline.transformer.state_dict().items() if ".lora_" in name}


def test_adapters_of_checkpoints_and_of_other_runs(settings_of):
    settings = settings_of(
        "flux", steps=2, checkpoint_every=1, checkpoints_kept=0, ema_decay=0.5, lr_warmup_steps=0,
        format=["diffusers", "comfyui"],
    )  # fmt: skip
    path = Trainer(TrainConfig(**settings)).run()
    output = Path(settings["output_dir"])
    states = [loaded(output / "checkpoints" / f"step-0000000{step}") for step in (1, 2)]
    assert all(states[1][name].equal(each) for name, each in loaded(output).items())
    assert not all(states[1][name].equal(each) for name, each in states[0].items())
    checksums = json.loads((output / "checkpoints" / "step-00000001" / "checksums.json").read_text())
    assert {"pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"} <= checksums.keys()
    assert any(name.endswith(".alpha") for name in load_file(output / "comfyui_lora.safetensors"))

    forget_accelerate()
    # With a learning rate of zero in the first step.
    settings = settings_of("flux", steps=2, init_adapter=str(output), adapter_init="default", learning_rate=1e-30)
    again = load_file(Trainer(TrainConfig(**settings)).run())
    for name, each in load_file(path).items():
        torch.testing.assert_close(again[name], each)

    forget_accelerate()
    settings = settings_of("flux", steps=2, init_adapter=str(output), adapter_init="default", rank=8)
    settings["cache_dir"] = f"{settings['output_dir']}/cache"
    with pytest.raises(TrainingError, match="Give the adapter's rank, such as --rank 4"):
        Trainer(TrainConfig(**settings)).run()
    assert not Path(settings["cache_dir"], "latents").exists()  # refused before anything is encoded


def test_a_picture_of_losses(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib, of the extra train, is not installed")
    entries = [{"step": step, "loss": 1 / step} for step in range(1, 201)]
    entries += [{"step": 100, "evaluation/loss": 0.5}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(each)}\n" for each in entries))
    picture = Image.open(draw_losses(metrics, tmp_path / "loss.png")).convert("L")
    assert picture.size == (960, 540) and picture.getextrema() == (0, 255)
    assert not list(tmp_path.glob("*unfinished*"))


def test_the_average_of_losses():
    assert moving_average([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert moving_average([4.0], 3) == [4.0]
