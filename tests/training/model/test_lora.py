"""Saved adapters load with the same bits, through diffusers if it supports the model."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_attn.training.errors import TrainingError
from diffusers_attn.training.families import family_of
from diffusers_attn.training.model.lora import (
    ADAPTER,
    IN_DIFFUSERS_FORMAT,
    INITIALISATIONS,
    KINDS,
    MOVES_BASE,
    adapter_config,
    adapter_weights,
    add_adapter,
    load_adapter,
    load_adapter_weights,
    move_base,
    save_adapter,
)

from ..runs import TINY_FLUX


def pipeline_of(name):
    if name == "flux":
        return DiffusionPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    from ...tiny_pipelines import make

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


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("flux", "wan", "cogvideox", "cogview4") for kind in IN_DIFFUSERS_FORMAT]
    + [(name, "lora") for name in ("qwen_image", "z_image", "flux2")],
)
def test_through_load_lora_weights(name, kind, tmp_path):
    pipeline = trained(name, kind)
    weights = adapter_weights(pipeline.transformer)
    save_adapter(pipeline, weights, tmp_path, kind, pipeline.transformer)
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


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("kind", IN_DIFFUSERS_FORMAT)
def test_the_picture_is_that_of_the_trained_model(kind, init, tmp_path):
    """Also where the adapter's beginning was taken off the base model, which the one who loads it has as it was."""
    base = pipeline_of("cogview4").transformer.state_dict()
    pipeline = pipeline_of("cogview4")
    targets = family_of(pipeline).lora_targets
    add_adapter(pipeline.transformer, adapter_config(kind, 4, 8.0, targets, init), seed=0)
    initial = adapter_weights(pipeline.transformer)
    now = {name.replace(".base_layer", ""): each for name, each in pipeline.transformer.state_dict().items()}
    moved = [name for name, each in base.items() if not each.equal(now[name])]
    assert bool(moved) == (init in MOVES_BASE)
    generator = torch.Generator().manual_seed(1)
    weights = {key: each + 0.2 * torch.randn(each.shape, generator=generator) for key, each in initial.items()}
    load_adapter_weights(pipeline.transformer, weights)
    save_adapter(pipeline, weights, tmp_path, kind, pipeline.transformer, initial if moved else None)
    plain, other = pipeline_of("cogview4"), pipeline_of("cogview4")
    other.load_lora_weights(str(tmp_path))
    drawn = [_drawn(each) for each in (pipeline, other, plain)]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4)
    assert (drawn[0] - drawn[2]).abs().max() > 0.1


def _drawn(pipeline):
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline("a cat", **settings, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images


def test_the_base_is_moved_as_the_initialisation_moved_it():
    """To the last bit, also in bfloat16: a resumed run has the same base."""
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (pipeline_of("cogview4").transformer.to(dtype) for _ in range(2))
        add_adapter(one, adapter_config("rslora", 4, 8.0, ["to_q", "to_out.0"], "olora"), seed=0)
        add_adapter(other, adapter_config("rslora", 4, 8.0, ["to_q", "to_out.0"]), seed=0)
        initial = adapter_weights(one)
        move_base(other, initial)
        load_adapter_weights(other, initial)
        assert all(each.equal(other.state_dict()[name]) for name, each in one.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_DIFFUSERS_FORMAT])
def test_through_load_adapter(kind, tmp_path):
    pipeline = trained("cogview4", kind)
    weights = adapter_weights(pipeline.transformer)
    assert weights
    save_adapter(pipeline, weights, tmp_path, kind, pipeline.transformer)
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
