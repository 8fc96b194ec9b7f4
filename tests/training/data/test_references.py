"""Reference images are found by the names of examples, and all problems with them are named."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from diffusers_attn.training import TrainConfig, TrainingError
from diffusers_attn.training.data import Buckets, LatentCache, LatentLoader, Share, TextCache
from diffusers_attn.training.data.errors import TrainingDataError
from diffusers_attn.training.data.examples import read_folder
from diffusers_attn.training.data.references import with_references
from diffusers_attn.training.data.store import read_tensors
from diffusers_attn.training.data.text_cache import text_key

from .media import picture


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


def names(examples):
    return [[each.path.name for each in example.references] for example in examples]


def test_one_or_several_by_name(examples, tmp_path):
    folder = references(tmp_path / "one", "a.jpg", "people/b.png", "c.png")
    assert names(with_references(examples, folder)) == [["a.jpg"], ["b.png"]]
    folder = references(tmp_path / "two", "a_1.png", "a_2.png", "people/b_1.png", "people/b_2.png", "people/b_4.png")
    assert names(with_references(examples, folder, most=2)) == [["a_1.png", "a_2.png"], ["b_1.png", "b_2.png"]]


def test_problems_are_named(examples, tmp_path):
    folder = references(tmp_path / "few", "a.png")
    with pytest.raises(TrainingDataError, match=r"no reference image people/b\.\* or people/b_1\.\*"):
        with_references(examples, folder)
    assert names(with_references(examples, folder, on_bad_data="skip")) == [["a.png"]]
    (folder / "people").mkdir()
    (folder / "people" / "b.png").write_bytes(b"no image")
    with pytest.raises(TrainingDataError, match="people/b.png.*broken image"):
        with_references(examples, folder)
    folder = references(tmp_path / "unequal", "a_1.png", "people/b_1.png", "people/b_2.png")
    with pytest.raises(TrainingDataError, match="2 reference images, but the first example has 1"):
        with_references(examples, folder, most=2)
    with pytest.raises(TrainingDataError, match="2 reference images, but the model accepts 1"):
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
        tmp_path / "cache", {}, Buckets.of(8 * 8, multiple=8, aspects=[1.0]), reference_size=lambda *size: (4, 6)
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


def test_they_belong_to_one_folder_of_data():
    with pytest.raises(TrainingError, match="--references r is accepted with --data only, not with further datasets"):
        TrainConfig(model="model", data="data", references="r", datasets=[{"path": "more"}])
