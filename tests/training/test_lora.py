"""Adapters come back from their files bit by bit, through diffusers where it knows them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import family_of
from diffusers_attn.training.lora import (
    ADAPTER,
    IN_DIFFUSERS_FORMAT,
    KINDS,
    adapter_config,
    adapter_weights,
    add_adapter,
    load_adapter,
    load_adapter_weights,
    save_adapter,
)

from .runs import TINY_FLUX


def pipeline_of(name):
    if name == "flux":
        return DiffusionPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    from ..tiny_pipelines import make

    return make(name)


def trained(name, kind, **others):
    """A pipeline with an adapter that is not as it began."""
    pipeline = pipeline_of(name)
    targets = others.pop("targets", family_of(pipeline).lora_targets)
    add_adapter(pipeline.transformer, adapter_config(kind, 4, 8.0, targets, **others), seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = adapter_weights(pipeline.transformer)
    load_adapter_weights(
        pipeline.transformer, {key: torch.randn(each.shape, generator=generator) for key, each in weights.items()}
    )
    return pipeline


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox", "cogview4"])
@pytest.mark.parametrize("kind", IN_DIFFUSERS_FORMAT)
def test_through_load_lora_weights(name, kind, tmp_path):
    pipeline = trained(name, kind)
    weights = adapter_weights(pipeline.transformer)
    save_adapter(pipeline, weights, tmp_path, kind)
    other = pipeline_of(name)
    other.load_lora_weights(str(tmp_path), adapter_name=ADAPTER)
    other.transformer.set_adapter(ADAPTER)
    loaded = {key: each for key, each in other.transformer.state_dict().items() if f".{ADAPTER}" in key}
    assert loaded.keys() == weights.keys()
    assert all(loaded[key].equal(weights[key]) for key in weights)
    scalings = [
        [getattr(each, "scaling", {}).get(ADAPTER) for each in model.modules() if hasattr(each, "lora_A")]
        for model in (pipeline.transformer, other.transformer)
    ]
    assert scalings[0] == scalings[1] and scalings[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_DIFFUSERS_FORMAT])
def test_through_load_adapter(kind, tmp_path):
    pipeline = trained("cogview4", kind)
    weights = adapter_weights(pipeline.transformer)
    assert weights
    save_adapter(pipeline, weights, tmp_path, kind)
    other = pipeline_of("cogview4")
    load_adapter(other.transformer, tmp_path)
    loaded = other.transformer.state_dict()
    assert all(loaded[key].equal(weights[key]) for key in weights)


def test_the_adapter_is_float32_and_all_that_is_trained():
    pipeline = pipeline_of("wan")
    pipeline.transformer.to(torch.bfloat16)
    parameters = add_adapter(pipeline.transformer, adapter_config("lora", 4, None, ["to_q"]), seed=0)
    assert {each.dtype for each in parameters} == {torch.float32}
    names = [name for name, each in pipeline.transformer.named_parameters() if each.requires_grad]
    assert len(names) == len(parameters) == 8 and all("lora_" in name and "to_q" in name for name in names)


def test_the_same_seed_gives_the_same_beginning_and_leaves_the_generator():
    begun = []
    for other_draws in (0, 3):
        transformer = pipeline_of("cogview4").transformer
        torch.rand(other_draws)
        before = torch.get_rng_state()
        add_adapter(transformer, adapter_config("lora", 4, None, ["to_q"], init="gaussian"), seed=0)
        assert torch.get_rng_state().equal(before)
        begun.append(adapter_weights(transformer))
    assert all(begun[0][name].equal(begun[1][name]) for name in begun[0])


def test_refused():
    with pytest.raises(TrainingError, match="adapter='lore'"):
        adapter_config("lore", 4, None, ["to_q"])
    with pytest.raises(TrainingError, match="adapter_init='gaussian' is for lora"):
        adapter_config("lokr", 4, None, ["to_q"], init="gaussian")
    with pytest.raises(TrainingError, match="to_q"):
        add_adapter(pipeline_of("wan").transformer, adapter_config("lora", 4, None, ["to_x"]), seed=0)
    pipeline = trained("wan", "lora")
    with pytest.raises(TrainingError, match="another adapter"):
        load_adapter_weights(pipeline.transformer, {"a": torch.zeros(1)})
