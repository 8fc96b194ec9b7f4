"""Settings of the data in whole runs: masks, weights, regularisation, clips and frame rates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffusers_attn.training import TrainConfig, Trainer, TrainingError
from diffusers_attn.training.batches.prepare import repeats_of
from diffusers_attn.training.data import clips, masks
from diffusers_attn.training.settings import choices
from diffusers_attn.training.settings.datasets import DataSet

from .data.media import video
from .runs import train, train_all
from .worlds import World


@pytest.fixture(autouse=True)
def _afterwards():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def masked(data, folder, box):
    """A copy of pictures with masks that keep a box."""
    folder = shutil.copytree(data, folder)
    for path in folder.glob("[0-9].png"):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, box)
        mask.save(folder / f"{path.stem}_mask.png")
    return str(folder)


def losses(settings):
    found = [step["loss"] for step in train(settings)["steps"]]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return found


def test_masks_and_weights_of_the_loss(settings_of, tmp_path):
    settings = settings_of("cogview4", steps=2, caption_dropout=0.0)
    plain = losses(settings)
    everything = masked(settings["data"], tmp_path / "everything", (0, 0, 48, 48))
    a_part = masked(settings["data"], tmp_path / "part", (0, 0, 24, 48))
    masks = {"steps": 2, "caption_dropout": 0.0, "loss_mask": "files"}
    assert losses(settings_of("cogview4", **masks, data=everything)) == pytest.approx(plain, rel=1e-6)
    of_a_part = losses(settings_of("cogview4", **masks, data=a_part))
    assert all(abs(one - other) > 1e-3 * other for one, other in zip(of_a_part, plain))
    # The gradient of a first step does not depend on the learning rate, which then is zero.
    weighted = [{"path": settings["data"], "weight": 2.5}]
    found = losses(settings_of("cogview4", steps=2, caption_dropout=0.0, data="", datasets=weighted))
    assert found[0] == pytest.approx(2.5 * plain[0], rel=1e-6)


@pytest.mark.slow
def test_masks_over_split_sequences(run_worlds, settings_of, tmp_path):
    """Loss and gradient are those of one process."""
    data = masked(settings_of("cogview4")["data"], tmp_path / "part", (0, 0, 20, 40))
    common = {"steps": 3, "data": data, "loss_mask": "files"}
    one = settings_of("cogview4", **common, batch_size=2)
    two = settings_of("cogview4", **common, batch_size=2, cp_degree=2)
    [[alone], several] = run_worlds(World(1, train_all, {"several": [one]}), World(2, train_all, {"several": [two]}))
    for of_rank in several:
        for ours, theirs in zip(of_rank[0]["steps"], alone[0]["steps"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient norm"] == pytest.approx(theirs["gradient norm"], rel=1e-5)


def test_clips_at_the_rate_of_the_model(settings_of, tmp_path):
    """The model has 16 frames per second; a video of 19 frames at 8 per second has 37 of them: four clips of 9."""
    data = tmp_path / "data"
    data.mkdir()
    video(data / "a.mp4", frames=19, width=48, height=48)
    (data / "a.txt").write_text("a dog, a cat")
    settings = settings_of("wan", steps=1, data=str(data), clips="all", trigger_word="sks", shuffle_tags=2, keep_tags=0)
    trainer = Trainer(TrainConfig(**settings))
    trainer.run()
    examples = [each.example for each in trainer.prepared.latents]
    assert [each.name for each in examples] == [f"a.mp4, clip {number}" for number in range(1, 5)]
    assert examples[0].captions == ("sks, a dog, a cat", "sks, a cat, a dog")
    assert trainer.prepared.fps == 16
    written = yaml.safe_load(Path(settings["output_dir"], "settings.yaml").read_text())
    assert (written["fps"], written["clips"]) == (16.0, "all")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    trainer = Trainer(TrainConfig(**settings_of("wan", steps=1, data=str(data), clips="all", fps=0)))
    trainer.run()
    assert [each.example.name for each in trainer.prepared.latents] == ["a.mp4, clip 1", "a.mp4, clip 2"]
    assert trainer.prepared.fps == 8


def test_the_command_line_accepts_what_the_data_accept():
    """Without importing them, and PyTorch with them, for --help."""
    assert (choices.CLIPS, choices.MASKS) == (clips.RULES, masks.MASKS)


def test_regularisation_balances_the_other_sets():
    person, place, other = DataSet("person", repeats=3), DataSet("place"), DataSet("other", regularisation=True)
    assert repeats_of([person, place, other], 1, [4, 2, 5]) == [[3] * 4, [1] * 2, [3, 3, 3, 3, 2]]
    assert repeats_of([person, other], 2, [2, 10]) == [[6, 6], [2] * 10]
    assert repeats_of([person, DataSet("other", regularisation=True, repeats=2)], 1, [2, 4]) == [[3, 3], [3] * 4]


def test_a_run_with_regularisation(settings_of, tmp_path):
    settings = settings_of("cogview4", steps=1, trigger_word="sks")
    others = shutil.copytree(settings["data"], tmp_path / "others")
    for number in "34":
        (others / f"{number}.png").unlink()
        (others / f"{number}.txt").unlink()
    sets = [{"path": str(others), "regularisation": True, "weight": 0.5}]
    trainer = Trainer(TrainConfig(**settings, datasets=sets))
    trainer.run()
    examples = [each.example for each in trainer.prepared.latents]
    assert [each.caption.startswith("sks, ") for each in examples] == [True] * 5 + [False] * 3
    assert [each.weight for each in examples] == [1.0] * 5 + [0.5] * 3
    assert trainer.prepared.repeats == [1] * 5 + [2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips": "tail"}, "--clips tail: accepted are head, middle, uniform:N, all"),
        ({"clips": "all", "frame_pick": "spread"}, "--clips all with --frame_pick spread"),
        ({"loss_mask": "png"}, "--loss_mask png: accepted are none, files, alpha"),
        ({"keep_tags": 1}, "--keep_tags 1 has no effect without --shuffle_tags"),
        ({"datasets": [{"path": "a", "weight": 0}]}, "entry 1: --weight 0"),
        ({"datasets": [{"path": "a", "clips": "uniform:0"}]}, "entry 1: --clips uniform:0: accepted are"),
        ({"data": "", "datasets": [{"path": "a", "regularisation": True}]}, "all sets are for regularisation"),
        ({"datasets": [{"path": "a", "regularisation": True, "trigger_word": "b"}]}, "`trigger_word` with `regul"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**{"model": "m", "data": "d", **settings})
