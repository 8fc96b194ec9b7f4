"""Batches of latents and embeddings: the same for the job, however many processes it has, and through a resume."""

import dataclasses
import itertools
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from diffusers_attn.training.data import (
    Buckets,
    LatentCache,
    LatentLoader,
    Share,
    TextCache,
    TrainingDataError,
    read_folder,
)

from .media import album, encode, encode_text, picture, video


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Latents of nine examples in three buckets, and embeddings of their captions."""
    folder = tmp_path_factory.mktemp("data")
    album(folder / "data", 5)
    for i in range(2):
        picture(folder / "data" / f"upright{i}.png", 48, 64, seed=10 + i)
        (folder / "data" / f"upright{i}.txt").write_text("upright" * (i + 1))
        video(folder / "data" / f"moving{i}.mp4", frames=9 + i)
        (folder / "data" / f"moving{i}.txt").write_text("moves")
    examples = read_folder(folder / "data")
    latents = LatentCache(folder, {}, Buckets.of(32 * 32, frames=(1, 5))).fill(examples, encode)
    return latents, TextCache(folder, {}).fill([each.caption for each in examples], encode_text)


def generator(step, position):
    return torch.Generator().manual_seed(1000 * step + position)


def loader(prepared, share=None, *, dropout=0.5, batch=4, **options):
    sampler = LatentLoader.sampler_for(prepared[0], global_batch_size=batch, seed=3)
    return LatentLoader(
        *prepared, sampler, share, caption_dropout=dropout, generator=generator if dropout else None, **options
    )


def take(loader, number):
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, number))
    finally:
        iterator.close()


def rows_of(batches):
    """What the job's batches were, in the order of positions within steps."""
    rows = [
        (batch["step"], position, name, caption, batch["bucket"])
        for batch in batches
        for position, name, caption in zip(batch["positions"], batch["names"], batch["captions"])
    ]
    return sorted(rows, key=lambda row: row[:2])


def test_one_of_several_captions_is_drawn_for_each_use(prepared):
    """Of all of them, and the same however many processes there are; which are dropped does not change."""
    latents, text = prepared
    several = [
        each._replace(example=dataclasses.replace(each.example, more_captions=("moves", "upright"))) for each in latents
    ]
    alone = rows_of(take(loader((several, text), Share(0, 1, 2)), 120))
    shared = [rows_of(take(loader((several, text), Share(rank, 2, 1)), 120)) for rank in range(2)]
    assert sorted([*shared[0], *shared[1]], key=lambda row: row[:2]) == alone
    usual = rows_of(take(loader(prepared, Share(0, 1, 2)), 120))
    assert [row[3] == "" for row in alone] == [row[3] == "" for row in usual]
    assert {row[3] for row in alone if row[2] == "00.png"} == {"", "picture 0", "moves", "upright"}
    with pytest.raises(TrainingDataError, match="has several captions, which needs generator="):
        loader((several, text), dropout=0.0)


def test_a_batch_is_what_was_encoded(prepared):
    by_name = {each.example.name: each for each in prepared[0]}
    for batch in take(loader(prepared, Share(0, 1, 2)), 30):
        for i, name in enumerate(batch["names"]):
            for key, tensor in load_file(by_name[name].path).items():
                assert torch.equal(batch[key][i], tensor)
            caption = batch["captions"][i]
            assert caption in ("", by_name[name].example.caption)
            text = load_file(prepared[1][caption])
            length = text["prompt_embeds"].shape[0]
            assert torch.equal(batch["prompt_embeds"][i, :length], text["prompt_embeds"])
            assert batch["prompt_embeds_mask"][i].tolist() == [True] * length + [False] * (
                batch["prompt_embeds"].shape[1] - length
            )
            assert not batch["prompt_embeds"][i, length:].any()
            assert torch.equal(batch["pooled"][i], text["pooled"])
        assert max(batch["prompt_embeds_mask"].sum(1)) == batch["prompt_embeds"].shape[1]
        assert "pooled_mask" not in batch
        assert {by_name[name].bucket for name in batch["names"]} == {batch["bucket"]}


def test_the_same_global_batches_on_any_number_of_processes(prepared):
    alone = rows_of(take(loader(prepared, Share(0, 1, 4)), 12))
    assert len({row[2] for row in alone}) == 9 and {row[3] for row in alone} > {"", "moves"}
    for size, micro in [(1, 1), (2, 1), (2, 2), (4, 1)]:
        micros = 12 * 4 // size // micro
        ranks = [take(loader(prepared, Share(rank, size, micro)), micros) for rank in range(size)]
        assert rows_of(itertools.chain(*ranks)) == alone
        assert [batch["last"] for batch in ranks[0]] == ([False] * (4 // size // micro - 1) + [True]) * 12


def test_resumed_on_other_numbers_of_processes(prepared):
    uninterrupted = rows_of(take(loader(prepared, Share(0, 1, 4)), 14))
    first = [loader(prepared, Share(rank, 2, 1)) for rank in range(2)]
    before = rows_of(itertools.chain(*(take(each, 2 * 5) for each in first)))
    (state,) = {json.dumps(each.state_dict()) for each in first}
    after = []
    for rank in range(4):
        resumed = loader(prepared, Share(rank, 4, 1))
        resumed.load_state_dict(json.loads(state))
        after += take(resumed, 9)
    assert before + rows_of(after) == uninterrupted


def test_state_is_of_what_was_given_and_not_of_what_was_read(prepared):
    reading = loader(prepared, Share(0, 1, 2), depth=8)
    iterator = iter(reading)
    positions = []
    for _ in range(6):
        next(iterator)
        positions.append(reading.state_dict()["position"] + 4 * reading.state_dict()["epoch"])
    assert reading.sampler.steps_per_epoch == 4
    assert positions == [0, 1, 1, 2, 2, 3]
    iterator.close()
    assert next(iter(reading))["step"] == 3
    with pytest.raises(TrainingDataError, match="have changed since"):
        loader(prepared, batch=2).load_state_dict(reading.state_dict())


def test_dropout_is_what_was_asked(prepared):
    captions = [row[3] for row in rows_of(take(loader(prepared, Share(0, 1, 4), dropout=0.25), 100))]
    assert 0.19 < captions.count("") / len(captions) < 0.31
    assert "" not in {row[3] for row in rows_of(take(loader(prepared, dropout=0.0), 50))}
    with pytest.raises(TrainingDataError, match="needs generator"):
        LatentLoader(*prepared, LatentLoader.sampler_for(prepared[0], global_batch_size=1), caption_dropout=0.1)
    with pytest.raises(TrainingDataError, match="caption_dropout=1.5"):
        loader(prepared, dropout=1.5)


def test_threads_end_with_the_iterator(prepared):
    before = threading.active_count()
    iterator = iter(loader(prepared, threads=3))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before


def test_a_file_that_is_lost_is_an_error_and_no_hang(prepared, tmp_path):
    latents = [each._replace(path=tmp_path / "lost.safetensors") for each in prepared[0]]
    broken = LatentLoader(latents, prepared[1], LatentLoader.sampler_for(latents, global_batch_size=1))
    with pytest.raises(TrainingDataError, match="lost.safetensors is missing.*Start again"):
        next(iter(broken))


def test_text_of_one_length_has_no_mask_and_own_masks_are_kept(prepared, tmp_path):
    captions = [each.example.caption for each in prepared[0]]
    sampler = LatentLoader.sampler_for(prepared[0], global_batch_size=2)

    def fixed(captions):
        return {"prompt_embeds": torch.ones(len(captions), 7, 2), "pooled": torch.zeros(len(captions), 3)}

    (batch,) = take(LatentLoader(prepared[0], TextCache(tmp_path, {"a": 1}).fill(captions, fixed), sampler), 1)
    assert "prompt_embeds_mask" not in batch and batch["prompt_embeds"].shape == (1, 7, 2)

    def masked(captions):
        given = encode_text(captions)
        # The encoder's own idea of what counts: not the first token.
        mask = torch.ones(given["prompt_embeds"].shape[:2], dtype=torch.long)
        mask[:, 0] = 0
        return {**given, "prompt_embeds_mask": mask}

    text = TextCache(tmp_path, {"a": 2}).fill(captions, masked)
    for batch in take(LatentLoader(prepared[0], text, sampler, Share(0, 1, 2)), 8):
        lengths = [max(1, len(caption)) for caption in batch["captions"]]
        assert batch["prompt_embeds_mask"].dtype == torch.long
        assert batch["prompt_embeds_mask"].sum(1).tolist() == [length - 1 for length in lengths]
        assert "prompt_embeds_mask_mask" not in batch


def test_what_does_not_go_together(prepared, tmp_path):
    latents, text = prepared
    sampler = LatentLoader.sampler_for(latents, global_batch_size=4)
    with pytest.raises(TrainingDataError, match="captions without embeddings: 'moves'"):
        LatentLoader(latents, {caption: path for caption, path in text.items() if caption != "moves"}, sampler)
    with pytest.raises(TrainingDataError, match="not a multiple of 3 data-parallel ranks"):
        LatentLoader(latents, text, sampler, Share(0, 3))
    other = TextCache(tmp_path, {}).fill(["moves"], lambda captions: {"embeds": torch.zeros(1, 2, 3)})
    with pytest.raises(TrainingDataError, match="same names for all"):
        LatentLoader(latents, {**text, "moves": other["moves"]}, sampler)
    wider = TextCache(tmp_path, {"a": 1}).fill(
        ["moves"], lambda captions: {"prompt_embeds": torch.zeros(1, 2, 9), "pooled": torch.zeros(1, 1)}
    )
    with pytest.raises(TrainingDataError, match="only the first dimension may vary"):
        LatentLoader(latents, {**text, "moves": wider["moves"]}, sampler)
