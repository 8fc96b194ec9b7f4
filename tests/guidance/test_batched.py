"""The models that are named as computing the samples of a batch separately do so."""

from __future__ import annotations

import inspect

import pytest
import torch

from diffusers_attn.guidance.batch import Batch
from diffusers_attn.guidance.batched import BATCHED, divides_batch
from tests.marks import thorough_but
from tests.zoo import CASES, outputs

# `cosmos` runs in float32 only. `cosmos_i2v`, of the same class, does not.
NAMES = [name for name, case in CASES.items() if case.model_class in BATCHED and name != "cosmos"]


def test_every_class_has_a_case():
    assert {CASES[name].model_class for name in NAMES} == BATCHED


@pytest.mark.parametrize("name", thorough_but(NAMES[::3], NAMES))
@torch.no_grad()
def test_samples_are_computed_separately(name):
    case = CASES[name]
    model = case.build(dtype=torch.float64).double().eval()
    assert divides_batch(model)
    first = next(iter(inspect.signature(model.forward).parameters))
    batch = Batch.of(case.inputs(dtype=torch.float64)[first])
    full = outputs(model(**case.inputs(dtype=torch.float64)))
    parts = [
        outputs(model(**batch.part_of(case.inputs(dtype=torch.float64), sample, batch.samples)))
        for sample in range(batch.samples)
    ]
    if len(full) == len(parts[0]):
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    else:  # a list with an output for each sample
        joined = [tensor for part in parts for tensor in part]
    assert batch.samples == 2 and len(joined) == len(full)
    for one, other in zip(joined, full, strict=True):
        assert (one - other).abs().max() < 1e-10 * other.abs().max()


def test_what_belongs_to_a_sample():
    batch, text, rotary = torch.zeros(2, 3), torch.zeros(2, 5, 4), torch.zeros(7, 4)
    images = [torch.zeros(4, 1, 2, 3), torch.zeros(4, 1, 3, 2)]
    blocks = [torch.zeros(2, 5), torch.zeros(2, 5)]  # of a ControlNet: each has all samples
    given = {"text": text, "more": {"scale": 2.0, "batch": batch}, "rotary": (rotary, rotary), "images": images}
    part = Batch(2).part_of(given | {"blocks": blocks, "sizes": [[(1, 2, 3)], [(1, 3, 2)]]}, 1, 2)
    assert part["text"].shape == (1, 5, 4) and part["more"]["batch"].shape == (1, 3) and part["more"]["scale"] == 2.0
    assert part["rotary"][0] is rotary and part["images"] == [images[1]] and part["sizes"] == [[(1, 3, 2)]]
    assert [each.shape for each in part["blocks"]] == [(1, 5), (1, 5)]


def test_uneven_parts_are_merged_as_they_were():
    batch = Batch(5)
    assert batch.sizes(2) == [3, 2] and batch.sizes(4) == [2, 1, 1, 1]
    output = {"sample": torch.randn(5, 3), "scale": torch.tensor(2.0), "each": ([torch.randn(2) for _ in range(5)],)}
    parts = [batch.part_of(output, part, 2) for part in range(2)]
    assert parts[0]["sample"].shape == (3, 3) and len(parts[1]["each"][0]) == 2
    merged = batch.merged(parts, output)
    assert torch.equal(merged["sample"], output["sample"]) and merged["scale"] == 2.0
    assert all(map(torch.equal, merged["each"][0], output["each"][0]))


def test_a_list_of_as_many_samples_as_channels_is_cut_by_samples():
    latents = [torch.randn(3, 1, 2, 2) for _ in range(3)]
    batch = Batch.of(latents)
    assert batch == Batch(3, listed=True) and torch.equal(batch.part_of([latents], 1, 3)[0][0], latents[1])
