"""Settings and data that cannot work are refused in seconds, before anything is encoded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import tracking

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.loop.card import check_push
from diffusers_attn.training.loop.checks import check_optimizing, without_weights
from diffusers_attn.training.loop.trainer import Trainer
from diffusers_attn.training.settings.choices import IN_DIFFUSERS_FORMAT, INITIALISATIONS, KINDS, WITHOUT_RANK

from ...tiny_pipelines import make
from ..runs import train
from ..worlds import forget_accelerate

MUST = {"model": "m", "data": "d"}


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    forget_accelerate()


DRAW = {"validation_prompts": ["a cat"]}


@pytest.mark.parametrize(
    ("family", "others", "message"),
    [
        ("cogview4", {"targets": ["to_q", "to_x"]}, "--targets to_q to_x: .*'to_x'.*Did you mean.*to_out.0, to_q"),
        ("cogview4", {"targets": [".*to_q", "to_k"]}, "--targets '.*to_q' to_k: .*expression must be the only value"),
        ("cogview4", {"targets": ["norm1"]}, "(?s)--targets norm1: .*not supported.*to_out.0, to_q"),
        ("cogview4", {"targets": ["to_q("]}, "--targets .* is not a regular expression"),
        ("cogview4", {"targets": [".*to_x"]}, "--targets .*to_x.*to_out.0, to_q"),
        ("cogview4", {"adapter_init": "olora", "rank": 128}, "--adapter_init olora with --rank 128 .*transf"),
        ("cogview4", {"validation_size": [40, 48], **DRAW}, "--validation_size 40 48: .* multiples of 16 .*as 32 48"),
        ("cogview4", {"validation_frames": 9, **DRAW}, "--validation_frames 9: CogView4Pipeline generates images"),
        ("cogview4", {"num_frames": [9]}, "--num_frames 9: CogView4Pipeline generates images"),
        ("cogview4", {"resolution": [15]}, "--resolution 15: this model needs a side of at least 16 pixels"),
        ("wan", {"validation_frames": 10, **DRAW}, "--validation_frames 10: .*4n .* 1 frames, such as 9 or 13"),
        ("wan", {"num_frames": [9, 10]}, "--num_frames 10: .*9 or 13"),
        ("flux", {"max_sequence_length": 600}, "--max_sequence_length 600 is not accepted by FluxPipeline: .*512"),
        ("flux", {"guidance": 3.5}, r"--guidance 3\.5: .*has no guidance input"),
        ("cogvideox", {"shift": 3.0}, "shift"),
        ("cogvideox", {"logit_mean": 0.5}, "--logit_mean 0.5 has no effect with --timestep_sampling uniform"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_encoded(settings_of, family, others, message):
    settings = settings_of(family, **others)
    settings["cache_dir"] = f"{settings['output_dir']}/cache"
    with pytest.raises(TrainingError, match=message):
        train(settings)
    assert not [path for path in Path(settings["cache_dir"]).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"trackers": ["tensorboard", "abacus"]}, "--trackers abacus: accepted are .*tensorboard"),
        ({"trackers": ["tensorboard", "aim"]}, "--trackers aim: its package is not installed: `pip install aim`"),
        ({"lr_schedule": "polynomial", "learning_rate": 1e-8}, "--lr_schedule polynomial does not work with .*1e-08"),
        ({"lr_schedule": "polynomial", "steps": 5, "lr_warmup_steps": 5}, "--lr_schedule polynomial .*--steps 5"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "not a valid repository name"),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path, others, message):
    assert "aim" not in tracking.get_available_trackers()
    with pytest.raises(TrainingError, match=message):
        Trainer(TrainConfig(**MUST, cpu=True, output_dir=str(tmp_path / "new"), **others))


@pytest.mark.parametrize("name", ["output_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written(tmp_path, name):
    """A file where the folder would be; the owner of this process may be allowed to write anywhere."""
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/below"):
        settings = {"output_dir": str(tmp_path / "output"), name: str(tmp_path / wrong)}
        with pytest.raises(TrainingError, match=rf"--{name} {re.escape(str(tmp_path / wrong))} cannot be written"):
            Trainer(TrainConfig(**MUST, cpu=True, **settings))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw"}, {"optimizer": "prodigy"}, {"lr_schedule": "cosine", "lr_warmup_steps": 5}]
)
def test_what_works_is_not_refused(settings, capfd):
    check_optimizing(TrainConfig(**MUST, **settings), torch.device("cpu"), sharded=True)


@pytest.mark.parametrize("settings", [{}, {"adapter": "none"}], ids=["an adapter", "all weights"])
def test_a_state_of_8_bits_is_not_sharded(settings):
    config = TrainConfig(**MUST, **settings, optimizer="adamw8bit")
    with pytest.raises(
        TrainingError, match="--optimizer adamw8bit with FSDP2: .* Give --optimizer adamw or --optimizer"
    ):
        check_optimizing(config, torch.device("cpu"), sharded=True)


def test_a_copy_without_weights():
    transformer = make("wan").transformer
    bare = without_weights(transformer)
    assert {each.device.type for each in [*bare.parameters(), *bare.buffers()]} == {"meta"}
    assert {each.device.type for each in [*transformer.parameters(), *transformer.buffers()]} == {"cpu"}
    assert [(name, each.shape) for name, each in bare.named_parameters()] == [
        (name, each.shape) for name, each in transformer.named_parameters()
    ]


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_adapters_that_exist_are_not_refused(adapter, init):
    from diffusers_attn.training.families import family_of
    from diffusers_attn.training.loop.checks import check_with_model
    from diffusers_attn.training.model.lora import adapter_config

    if init != "default" and adapter not in IN_DIFFUSERS_FORMAT:
        return
    family = family_of(make("cogview4"))
    rank = {} if adapter in WITHOUT_RANK else {"rank": 4}
    config = TrainConfig(**MUST, adapter=adapter, adapter_init=init, **rank)
    check_with_model(config, family, adapter_config(adapter, 4, None, family.lora_targets, init))


def test_an_upload_without_a_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(TrainingError, match="without a token: log in with `hf auth login`, or set HF_TOKEN"):
        check_push(TrainConfig(**MUST, push_to_hub=True))
    monkeypatch.setenv("HF_TOKEN", "hf_tried")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match="HF_HUB_OFFLINE=1"):
        check_push(TrainConfig(**MUST, push_to_hub=True))


def test_a_tracker_that_cannot_be_started(settings_of, monkeypatch, request):
    """wandb without a key, and without a terminal to ask for one; nothing was encoded."""
    wandb = pytest.importorskip("wandb")
    # wandb reads its environment once per process. The tests after this one set another.
    wandb.teardown()
    request.addfinalizer(wandb.teardown)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", settings_of("cogview4")["output_dir"])
    settings = settings_of("cogview4", trackers=["wandb"])
    settings["cache_dir"] = f"{settings['output_dir']}/cache"
    with pytest.raises(TrainingError, match="--trackers wandb cannot be started: .*wandb login"):
        train(settings)
    assert not Path(settings["cache_dir"]).exists() or not any(Path(settings["cache_dir"]).rglob("*.safetensors"))
