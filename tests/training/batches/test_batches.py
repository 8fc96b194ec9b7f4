"""The noise of a step is the same whichever process draws it, and an evaluation gets the inputs of training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_attn.training import TrainConfig
from diffusers_attn.training.batches.noise import Noise
from diffusers_attn.training.batches.prepare import PreparedData, evaluation_batches
from diffusers_attn.training.data import LatentLoader, Share
from diffusers_attn.training.data.latent_cache import CachedLatents
from diffusers_attn.training.data.store import TensorStore
from diffusers_attn.training.loss import sample_u
from diffusers_attn.training.randomness import SampleRandomness


class Named:
    """As much of an example as batches look at."""

    kind = "image"
    more_captions = ()
    weight = 1.0

    def __init__(self, name: str, caption: str) -> None:
        self.name, self.caption, self.captions = name, caption, (caption,)


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    """Four examples, whose captions have from two to five tokens."""
    store = TensorStore(tmp_path)

    def write(key: str, **tensors: torch.Tensor) -> Path:
        store.write(key, tensors, {})
        return store.path(key)

    latents, text = [], {"": write("empty", words=torch.zeros(1, 3))}
    for number in range(4):
        caption = f"caption {number}"
        path = write(f"latents {number}", **{f"latents_{each}": torch.randn(2, 1, 4, 4) for each in ("mean", "logvar")})
        latents.append(CachedLatents(Named(f"{number}.png", caption), (1, 32, 32), path))
        text[caption] = write(caption, words=torch.randn(2 + number, 3))
    return PreparedData(latents, text, latents)


def batches(prepared: PreparedData, share: Share, finish: Noise | None, number: int) -> list[dict]:
    sampler = LatentLoader.sampler_for(prepared.latents, global_batch_size=4, seed=1)
    iterator: Any = iter(LatentLoader(prepared.latents, prepared.text, sampler, share, finish=finish))
    try:
        return list(itertools.islice(iterator, number))
    finally:
        iterator.close()


def test_what_is_drawn_ahead_is_what_was_drawn_before(prepared: PreparedData) -> None:
    config = TrainConfig(model="m", data="d", seed=7, logit_mean=0.5)
    noise = Noise(config, "logit_normal", {"transformer": (0.0, 1.0)}, pin=False)
    for batch in batches(prepared, Share(1, 2, 2), noise, 3):
        random = SampleRandomness(7, batch["step"], batch["positions"])
        drawn = batch["drawn"]
        assert all(drawn[what].equal(random.normal(what, (2, 1, 4, 4))) for what in ("posterior", "noise"))
        assert drawn["u"].equal(sample_u("logit_normal", random.generators("level"), 0.5, config.logit_std))
    plain = batches(prepared, Share(1, 2, 2), None, 1)[0]
    assert "drawn" not in plain and plain["positions"] == [2, 3]


def test_an_evaluation_is_given_the_masks_of_training(prepared: PreparedData) -> None:
    trained = {
        name: {key: each[0] for key, each in batch.items() if isinstance(each, torch.Tensor)}
        for batch in batches(prepared, Share(0, 1, 1), None, 4)
        for name in batch["names"]
    }
    for number, batch in enumerate(evaluation_batches(prepared, range(4))):
        expected = trained[f"{number}.png"]
        assert batch.keys() == expected.keys() - {"loss_weight"} and "words_mask" in batch
        assert all(each[0].equal(expected[key]) for key, each in batch.items())
