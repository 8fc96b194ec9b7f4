"""Conditions are found in folders, by the names of examples, and in columns; all problems with them are named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.data import (
    Buckets,
    LatentCache,
    LatentLoader,
    Share,
    TextCache,
    conditions,
    decode,
    read_dataset,
)
from diffusers_attn.training.data.conditions import Wanted, with_conditions
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.examples import read_folder
from diffusers_attn.training.data.pixels import References
from diffusers_attn.training.data.store import read_tensors
from diffusers_attn.training.data.text_cache import text_key
from diffusers_attn.training.settings import choices

from .media import picture, video


@pytest.fixture
def examples(tmp_path):
    for name in ("a", "people/b"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / "data" / f"{name}.png", width=8, height=8, seed=len(name))
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    return read_folder(tmp_path / "data")


def references(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(folder / name, width=8, height=8, seed=1)
    return folder


def names(examples, kind="references"):
    return [[each.source.path.name for each in example.conditions[kind]] for example in examples]


def with_references(examples, folder, most=1, **options):
    return with_conditions(examples, {"references": Wanted(most)}, {"references": folder}, **options)


def test_one_or_several_by_name(examples, tmp_path):
    folder = references(tmp_path / "one", "a.jpg", "people/b.png", "c.png")
    assert names(with_references(examples, folder)) == [["a.jpg"], ["b.png"]]
    folder = references(tmp_path / "two", "a_1.png", "a_2.png", "people/b_1.png", "people/b_2.png", "people/b_4.png")
    assert names(with_references(examples, folder, most=2)) == [["a_1.png", "a_2.png"], ["b_1.png", "b_2.png"]]


def test_problems_are_named(examples, tmp_path):
    folder = references(tmp_path / "few", "a.png")
    with pytest.raises(TrainingDataError, match=r"no reference image: no people/b\.\* or people/b_1\.\*"):
        with_references(examples, folder)
    assert names(with_references(examples, folder, on_bad_data="skip")) == [["a.png"]]
    (folder / "people").mkdir()
    (folder / "people" / "b.png").write_bytes(b"no image")
    with pytest.raises(TrainingDataError, match="people/b.png: its reference image: a broken image"):
        with_references(examples, folder)
    folder = references(tmp_path / "unequal", "a_1.png", "people/b_1.png", "people/b_2.png")
    with pytest.raises(
        TrainingDataError, match="people/b.png: its number of reference images is 2, but that of the first example is 1"
    ):
        with_references(examples, folder, most=2)
    with pytest.raises(TrainingDataError, match="its number of reference images is 2, but the model accepts 1"):
        with_references(examples, folder)
    with pytest.raises(TrainingDataError, match="there is no folder"):
        with_references(examples, tmp_path / "nothing")


def test_examples_with_another_reference_are_encoded_again(examples, tmp_path):
    cache = LatentCache(tmp_path / "cache", {}, Buckets.of(8 * 8, multiple=8, aspects=[1.0]))
    shapes = []

    def encode(pixels, references):
        shapes.append((tuple(pixels.shape), tuple(references.shape)))
        return {"latents_mean": pixels.mean((1, 3, 4)), "reference": references.mean((2, 3, 4))}

    for seed in (1, 1, 2):
        folder = references(tmp_path / "references", "people/b.png")
        picture(folder / "a.png", width=12, height=8, seed=seed)
        cache.fill(with_references(examples, folder), encode)
    assert shapes == [((1, 3, 1, 8, 8), (1, 1, 3, 8, 8))] * 3


def test_captions_are_encoded_with_the_references_of_their_example(examples, tmp_path):
    """Two examples have the same caption. Their embeddings are those of their own picture, also if it changes."""
    cache = LatentCache(
        tmp_path / "cache",
        {},
        Buckets.of(8 * 8, multiple=8, aspects=[1.0]),
        references=References(lambda *size: (4, 6)),
    )
    folder = references(tmp_path / "references", "a.png", "people/b.png")
    pictures = []

    def encode(pixels, references):
        assert references.shape == (1, 1, 3, 4, 6)
        return {"latents_mean": pixels.mean((1, 3, 4)), "reference": references.mean((2, 3, 4))}

    def encode_text(captions, references):
        pictures.append((*captions, references.mean().item()))
        return {"embeds": references.mean((2, 3, 4))[..., None]}

    def encoded():
        both = [dataclasses.replace(each, caption="same") for each in with_references(examples, folder)]
        latents = cache.fill(both, encode)
        captions = [text_key(each, each.example.caption, True) for each in latents]
        text = TextCache(tmp_path / "cache", {}).fill(captions, encode_text, references=cache.references_of)
        with pytest.raises(TrainingDataError, match="batch_size=2: captions with pictures need batch_size=1"):
            TextCache(tmp_path / "cache", {}).fill(captions, encode_text, batch_size=2, references=cache.references_of)
        sampler = LatentLoader.sampler_for(latents, global_batch_size=2, seed=0)
        draw = {"caption_dropout": 0.5, "generator": lambda *place: torch.Generator().manual_seed(sum(place))}
        loader = LatentLoader(latents, text, sampler, Share(0, 1, 2), pictured=True, **draw)
        with contextlib.closing(iter(loader)) as batches:
            return latents, [next(batches) for _ in range(4)]

    for seed, times in ((1, 4), (2, 2)):  # captions and the empty ones: of both examples, then of the changed one
        picture(folder / "a.png", width=12, height=8, seed=seed)
        pictures.clear()
        latents, batches = encoded()
        assert len(pictures) == times
        means = {each.example.name: read_tensors(each.path)["reference"].item() for each in latents}
        assert len(set(means.values())) == 2
        for batch in batches:
            assert batch["embeds"].flatten().tolist() == pytest.approx([means[name] for name in batch["names"]])
        assert {caption for batch in batches for caption in batch["captions"]} == {"", "same"}


@pytest.mark.parametrize("kind", conditions.CONDITIONS)
def test_settings_name_every_kind(kind):
    assert set(choices.CONDITIONS) == set(conditions.CONDITIONS)
    assert getattr(TrainConfig(model="model", data="data", **{kind: "folder"}), kind) == "folder"


def metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_columns_of_a_metadata_file_name_them(tmp_path):
    """Relative to itself, within the folder of the data or not. Those without captions are no examples."""
    data = references(tmp_path / "data", "a.png", "b.png", "control/a.png", "b_2.png")
    references(tmp_path, "elsewhere/b.png")
    metadata(
        data,
        {"file_name": "a.png", "text": "a", "control": "control/a.png"},
        {"file_name": "b.png", "text": "b", "control": "../elsewhere/b.png"},
        {"file_name": "b_2.png", "text": "b", "control": "b.png"},
    )
    wanted = {"control": Wanted()}
    found = with_conditions(read_folder(data, conditions=["control"]), wanted, {})
    assert [each.name for each in found] == ["a.png", "b.png", "b_2.png"]
    assert names(found, "control") == [["a.png"], ["b.png"], ["b.png"]]
    source: Any = found[1].conditions["control"][0].source
    assert source.path.resolve() == tmp_path / "elsewhere" / "b.png"
    with pytest.raises(TrainingDataError, match=r"control/a\.png: no caption"):
        read_folder(data)
    # A folder has precedence.
    folder = references(tmp_path / "folder", "a.jpg", "b.jpg", "b_2.jpg")
    assert names(with_conditions(found, wanted, {"control": folder}), "control") == [["a.jpg"], ["b.jpg"], ["b_2.jpg"]]


def test_several_in_columns(tmp_path):
    data = references(tmp_path, "a.png", "b.png", "r/1.png", "r/2.png")
    wanted = {"references": Wanted(2)}
    metadata(
        data,
        {"file_name": "a.png", "text": "a", "references": ["r/1.png", "r/2.png"]},
        {"file_name": "b.png", "text": "b", "references": ["r/2.png", "r/1.png"]},
    )
    found = with_conditions(read_folder(data, conditions=["references"]), wanted, {})
    assert names(found) == [["1.png", "2.png"], ["2.png", "1.png"]]
    (data / "metadata.jsonl").unlink()
    table = "file_name,text,references_1,references_2\na.png,a,r/1.png,r/2.png\nb.png,b,r/2.png,"
    (data / "metadata.csv").write_text(table)
    examples = read_folder(data, conditions=["references"])
    with pytest.raises(TrainingDataError, match=r"b\.png: its number of reference images is 1, but that of the first"):
        with_conditions(examples, wanted, {})
    assert names(with_conditions(examples[:1], wanted, {})) == [["1.png", "2.png"]]


def test_an_example_without_one_is_named_with_both_ways(examples, tmp_path):
    wanted = {"control": Wanted()}
    both = (
        r"people/b\.png: no control picture or video: nothing in a column control of its table, and no --control with"
    )
    with pytest.raises(TrainingDataError, match=both):
        with_conditions(examples, wanted, {})
    folder = references(tmp_path / "few", "a.png")
    with pytest.raises(
        TrainingDataError, match=r"b\.\* or people/b_1\.\* in .*few \(a column control of its table is read"
    ):
        with_conditions(examples, wanted, {"control": folder})
    assert with_conditions(examples, {"control": Wanted(needed=False)}, {})[0].conditions == {}
    either = {"control": Wanted(instead=("references",)), "references": Wanted(needed=False)}
    with pytest.raises(TrainingDataError, match="no control picture or video and no reference image: nothing in a col"):
        with_conditions(examples, either, {})
    images = references(tmp_path / "images", "a.png", "people/b.png")
    assert names(with_conditions(examples, either, {"references": images})) == [["a.png"], ["b.png"]]
    masked = {"control": Wanted(needed=False), "control_mask": Wanted(needed=False)}
    with pytest.raises(TrainingDataError, match="a control mask without a control picture or video"):
        with_conditions(examples, masked, {"control_mask": images})
    assert with_conditions(examples, {}, {}) == examples


def test_columns_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(picture(tmp_path / f"{i}.png", width=8, height=8, seed=i)) for i in range(4)]
    table = {"image": files[:2], "text": ["a", "b"], "control.png": files[2:]}
    dataset = datasets.Dataset.from_dict(table)
    for column in ("image", "control.png"):
        dataset = dataset.cast_column(column, datasets.Image())
    found = with_conditions(read_dataset(dataset, conditions=["control"]), {"control": Wanted()}, {})
    expected = [decode.read_image(conditions.given_file(Path(each)).source) for each in files[2:]]
    for each, pixels in zip(found, expected, strict=True):
        assert decode.read_image(each.conditions["control"][0].source).equal(pixels)
    with pytest.raises(TrainingDataError, match="but has 2 .*read these from columns `references` and `control`"):
        read_dataset(dataset)
    with pytest.raises(
        TrainingDataError, match="--control has a folder.*rows of a dataset.*column of images or videos"
    ):
        with_conditions(found, {"control": Wanted()}, {"control": tmp_path})


def test_a_control_follows_its_video(tmp_path):
    """Frame by frame, at the frames that are picked; a picture holds for all."""
    video(tmp_path / "data" / "a.mp4", frames=12, fps=8)
    (tmp_path / "data" / "a.txt").write_text("a")
    examples = read_folder(tmp_path / "data")
    cache = LatentCache(tmp_path / "cache", {}, Buckets.of(48 * 64, multiple=8, aspects=[4 / 3], frames=[5]))
    seen = {}

    def encode(pixels, control):
        seen.update(pixels=pixels, control=control)
        return {"latents_mean": pixels.mean((1, 3, 4))}

    def encoded(folder):
        cache.fill(with_conditions(examples, {"control": Wanted()}, {"control": folder}), encode)
        return seen["pixels"], seen["control"]

    video(tmp_path / "same" / "a.mkv", frames=12, fps=8)
    pixels, control = encoded(tmp_path / "same")
    assert pixels.shape == control.shape == (1, 3, 5, 48, 64)
    assert torch.allclose(pixels, control, atol=0.05) and (pixels[:, :, 0] - control[:, :, 1]).abs().max() > 0.1
    pixels, control = encoded(picture(tmp_path / "one" / "a.png").parent)
    assert control.shape == pixels.shape and torch.equal(control[:, :, 0], control[:, :, 4])
    small = picture(tmp_path / "small" / "a.png", width=32, height=24)
    assert encoded(small.parent)[1].shape == pixels.shape
    video(tmp_path / "short" / "a.mp4", frames=11, fps=8)
    with pytest.raises(TrainingDataError, match="picture or video has 11 frames, but it has 12; equal numbers"):
        encoded(tmp_path / "short")
    wide = picture(tmp_path / "wide" / "a.png", width=64, height=46)
    with pytest.raises(TrainingDataError, match="has 64x46 pixels, but it has 64x48; the same shape is needed"):
        encoded(wide.parent)


def test_they_belong_to_one_folder_of_data():
    with pytest.raises(TrainingError, match="--references r is accepted with --data only, not with further datasets"):
        TrainConfig(model="model", data="data", references="r", datasets=[{"path": "more"}])
