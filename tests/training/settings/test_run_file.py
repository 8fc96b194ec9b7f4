"""Run files and recipes: settings by name, in YAML or TOML, from which a run can be repeated."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.settings.recipes import FOLDER, recipe_file, recipes
from diffusers_attn.training.settings.run_file import read_run_file

from ...documents import ROOT
from ...marks import thorough_but
from ..runs import make_data, train


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


YAML = """
model: m
data: d
mixed_precision: no        # text, as in YAML 1.2
learning_rate: 1e-4        # a number, as in YAML 1.2
resolution: 512            # a list of one
adam_betas: [0.9, 0.95]
gradient_checkpointing: false
resume: 250                # text
ema_decay:
"""
TOML = """
model = "m"
data = "d"
mixed_precision = "no"
learning_rate = 1e-4
resolution = [512]
adam_betas = [0.9, 0.95]
gradient_checkpointing = false
resume = "250"
"""


@pytest.mark.parametrize("suffix, text", [("yaml", YAML), ("toml", TOML)])
def test_a_run_file_has_settings_by_name(tmp_path, suffix, text):
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    config = TrainConfig.from_arguments(["--config", str(path)])
    assert config == TrainConfig(
        model="m", data="d", mixed_precision="no", learning_rate=1e-4, adam_betas=[0.9, 0.95],
        gradient_checkpointing=False, resume="250",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("rnak: 3", r"run.yaml: 'rnak' is not a setting. Did you mean 'rank'\?"),
        ("rank: 0", "run.yaml: --rank 0: whole numbers from 1"),
        ("rank: 2.5", "run.yaml: --rank 2.5: whole numbers from 1"),
        ("rank: many", "run.yaml: rank: 'many': accepted are whole numbers"),
        ("rank: true", "run.yaml: rank: True: accepted are whole numbers"),
        ("rank: [1, 2]", r"run.yaml: rank: \[1, 2\]: accepted are whole numbers"),
        ("rank:", "run.yaml: rank: None: accepted are whole numbers"),
        ("metrics: yes", "run.yaml: metrics: 'yes': accepted are true and false"),
        ("compile: yes", "run.yaml: compile: 'yes': accepted are auto, true and false"),
        ("optimizer: sgd", "run.yaml: --optimizer sgd: accepted are adamw, "),
        ("rank: 3\nrank: 4", "run.yaml is not valid YAML: 'rank' is there twice"),
        ("rank: [", "run.yaml is not valid YAML"),
        ("- rank", "run.yaml: names with values are accepted"),
        ("config: other.yaml", "'config' is not a setting"),
        ("recipe: flux2-kleine", "--recipe flux2-kleine: accepted are .* Did you mean 'flux2-klein'?"),
    ],
)
def test_a_mistake_in_a_run_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    output = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(output):
        TrainConfig.from_arguments(["--config", str(tmp_path / "run.yaml"), "--model", "m", "--data", "d"])
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(output.getvalue())


def test_a_run_file_that_cannot_be_read(tmp_path):
    for name, message in (("run.json", "ends in .yaml, .yml, .toml"), ("none.yaml", "No such file"), ("", "ends in")):
        with pytest.raises(TrainingError, match=message):
            read_run_file(tmp_path / name, TrainConfig)
    (tmp_path / "run.toml").write_text("rank: 3")
    with pytest.raises(TrainingError, match="not valid TOML"):
        read_run_file(tmp_path / "run.toml", TrainConfig)


def test_the_command_line_overrides_the_file_and_the_file_its_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: wan-1.3b\ndata: d\nrank: 8\nseed: 5\n")
    config = TrainConfig.from_arguments(["--config", str(path), "--seed", "6", "--no-compile"])
    of_recipe = read_run_file(recipe_file("wan-1.3b"), TrainConfig)
    assert of_recipe["rank"] != 8
    assert config == TrainConfig(**{**of_recipe, "data": "d", "rank": 8, "seed": 6, "compile": False})
    other = TrainConfig.from_arguments(["--config", str(path), "--recipe", "z-image"])
    assert other.model == read_run_file(recipe_file("z-image"), TrainConfig)["model"]


def test_a_run_is_repeated_from_the_file_beside_its_adapter(settings_of, tmp_path, monkeypatch):
    settings = settings_of("cogview4", steps=2, ema_decay=0.5, validation_prompts=['no: \'a "cat"'])
    settings |= {"validation_steps": 1, "learning_rate": 1e-3}
    first = train(settings)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    file = Path(settings["output_dir"], "settings.yaml")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig.from_arguments(["--config", str(file), "--output_dir", "again"])
    assert config.timestep_sampling == "logit_normal" and config.targets and config.lr_warmup_steps == 2
    steps = []
    Trainer(config, on_step=lambda step, numbers: steps.append({"step": step, **numbers})).run()
    assert steps == first["steps"]
    assert Path("again/settings.yaml").read_text() == file.read_text().replace(
        str(Path(settings["output_dir"])), str(tmp_path / "again")
    )
    with pytest.raises(TrainingError, match="has checkpoints of an earlier run"):
        AcceleratorState._reset_state(True)
        Trainer(TrainConfig.from_arguments(["--config", str(file)]))
    resumed = TrainConfig.from_arguments(["--config", str(file), "--resume", "latest", "--steps", "3"])
    assert [each["step"] for each in train_with(resumed)[1]] == [3]


def test_several_sets_of_data(settings_of, tmp_path, capsys):
    made = settings_of("cogview4", gradient_accumulation_steps=1, lr_warmup_steps=0)
    more = make_data("image", tmp_path / "more", 2)
    datasets = [
        {"path": made["data"], "repeats": 2},
        {"path": str(more), "caption_prefix": "sks style, ", "resolution": 32},
    ]
    path = tmp_path / "run.yaml"
    settings = {name: each for name, each in made.items() if name != "data"}
    path.write_text(yaml.safe_dump({**settings, "datasets": datasets, "repeats": 1, "steps": 12}))
    arguments = ["--config", str(path)]
    train_with(TrainConfig.from_arguments([*arguments, "--dry_run"]))
    said = capsys.readouterr().out
    assert "dry run of 12 steps per epoch" in said  # 5 examples twice, and 2 once
    assert "1x48x48: 5 examples" in said and "1x32x32: 2 examples" in said

    trainer, steps = train_with(TrainConfig.from_arguments(arguments))
    found = trainer.prepared.latents
    uses = Counter(index for number in range(12) for index in trainer.training.loader.sampler.step(number).indices)
    assert [uses[i] for i in range(len(found))] == [2] * 5 + [1] * 2
    assert {each.bucket.height for each in found[:5]} == {48} and {each.bucket.height for each in found[5:]} == {32}
    assert [each.example.caption for each in found[5:]] == ["sks style, number 0", "sks style, number 1 and more of it"]
    assert len({each["loss"] for each in steps}) == 12

    written = Path(made["output_dir"], "settings.yaml")
    again = TrainConfig.from_arguments(["--config", str(written), "--output_dir", str(tmp_path / "again")])
    assert train_with(again)[1] == steps


def train_with(config):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    steps = []
    trainer = Trainer(config, on_step=lambda step, numbers: steps.append({"step": step, **numbers}))
    trainer.run()
    return trainer, steps


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([{"repeats": 2}], "datasets, entry 1: `path` is missing"),
        ([{"path": "a"}, {"path": "b", "repeat": 2}], r"datasets, entry 2: 'repeat' .*Did you mean 'repeats'\?"),
        ([{"path": "a", "repeats": 0}], "datasets, entry 1: --repeats 0: whole numbers from 1"),
        (["a"], "datasets, entry 1: names with values are accepted"),
        ({"path": "a"}, "datasets: a list is accepted"),
    ],
)
def test_a_mistake_in_a_set_of_data_is_named(datasets, message):
    with pytest.raises(TrainingError, match=message):
        TrainConfig(model="m", datasets=datasets)


TINY = {
    "flux-16gb": "flux", "flux2-klein": "flux2", "qwen-image-24gb": "qwen_image", "wan-1.3b": "wan",
    "wan-14b-24gb": "wan", "z-image": "z_image",
}  # fmt: skip
"""The family of each recipe."""


def test_every_recipe_is_tried():
    assert set(TINY) == set(recipes()) and all(recipes().values())
    assert (ROOT / "examples" / "recipes").resolve() == FOLDER.resolve()


@pytest.mark.parametrize("name", thorough_but(["z-image"], list(TINY)))
def test_a_recipe_trains_a_tiny_model(settings_of, name):
    of_recipe = read_run_file(recipe_file(name), TrainConfig)
    if of_recipe.get("base_precision") == "nf4":  # which needs a GPU
        pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[quantization]'")
        of_recipe["base_precision"] = "int8"
    tiny = settings_of(TINY[name], steps=1, lr_warmup_steps=0, gradient_accumulation_steps=1)
    kept = {key: each for key, each in of_recipe.items() if key not in ("model", "resolution", "num_frames", "fps")}
    config = {**tiny, **kept, "cache_dir": f"{tiny['output_dir']}/cache"}
    assert len(train(config)["steps"]) == 1


def test_a_dry_run_tells_what_to_expect_and_writes_nothing(settings_of, capsys):
    settings = settings_of("cogview4", dry_run=True, batch_size=2, resolution=[32, 48], repeats=3, max_upscale=1.0)
    folder = Path(settings["output_dir"])
    settings["cache_dir"] = str(folder / "cache")
    steps = train(settings)["steps"]
    output = capsys.readouterr().out
    assert steps == [] and not folder.exists()
    assert "dry run of 4 steps per epoch; 10 steps are 2.5 epochs" in output  # 15 examples, 4 in each step
    assert "compile    blocks are not compiled: there is no CUDA GPU (--compile auto)" in output
    assert "5 examples in 1 bucket" in output and "1x48x48: 5 examples" in output
    assert "base model of " in output and "while data are encoded" in output and "lora of rank 4" in output


def test_a_dry_run_finds_what_a_run_would_be_refused_for(settings_of):
    with pytest.raises(TrainingDataError, match="max_upscale"):
        train(settings_of("cogview4", dry_run=True, resolution=[512], max_upscale=1.0))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with pytest.raises(TrainingError, match="--targets to_x"):
        train(settings_of("cogview4", dry_run=True, targets=["to_x"]))
