"""Changes of a model that invalidate its recorded graph are detected, and no others."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from diffusers_attn import AttentionProviderError, attention_provider, set_attention_provider
from diffusers_attn.runtime.cuda_graphs.apply import apply_cuda_graphs, remove_cuda_graphs
from diffusers_attn.runtime.cuda_graphs.snapshot import Snapshot, surroundings

FOLDER = Path(__file__).parents[3] / "examples" / "tiny_flux" / "transformer"


@pytest.fixture
def model():
    model = FluxTransformer2DModel.from_pretrained(FOLDER, local_files_only=True).eval()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    return model


def inputs(model):
    text = torch.zeros(1, 4, model.config.joint_attention_dim)
    return {
        "hidden_states": torch.zeros(1, 16, model.config.in_channels),
        "encoder_hidden_states": text,
        "pooled_projections": torch.zeros(1, model.config.pooled_projection_dim),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
        "guidance": torch.ones(1) if model.config.guidance_embeds else None,
    }


def first(model, kind):
    return next(module for module in model.modules() if hasattr(module, kind))


CHANGES = {
    "an adapter is added": lambda model: model.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "other"),
    "it is scaled": lambda model: model.set_adapters("style", weights=0.5),
    "it is turned off": lambda model: model.disable_adapters(),
    "it is fused": lambda model: model.fuse_lora(),
    "it is removed": lambda model: model.delete_adapters("style"),
    "another provider": lambda model: set_attention_provider(model, "native"),
    "projections are fused": lambda model: model.fuse_qkv_projections(),
    "weights move": lambda model: model.to(torch.float64),
    "one weight moves": lambda model: setattr(model.proj_out.weight, "data", model.proj_out.weight.data.clone()),
    "a weight is another": lambda model: setattr(model.proj_out, "bias", None),
    "a module is another": lambda model: setattr(model, "proj_out", torch.nn.Linear(96, 16)),
    "a hook": lambda model: model.transformer_blocks[0].register_forward_hook(lambda *_: None),
    "a setting": lambda model: setattr(first(model, "eps"), "eps", 0.5),
    "training": lambda model: model.train(),
    "blocks are compiled": lambda model: model.transformer_blocks[0].compile(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(model, change):
    snapshot = Snapshot(model)
    assert snapshot.holds()
    CHANGES[change](model)
    assert not snapshot.holds()
    assert Snapshot(model).holds()


def test_watched_calls_are_no_change(model):
    """Only those of the model itself: its forward is recorded, and what calls it is not."""
    snapshot = Snapshot(model)
    vars(model)["_call_impl"] = model._call_impl
    assert snapshot.holds() and Snapshot(model).holds()
    later = Snapshot(model)
    del vars(model)["_call_impl"]
    assert later.holds()
    vars(first(model, "processor"))["_call_impl"] = lambda *_: None
    assert not later.holds()


def test_a_processors_settings_are_noticed(model):
    processor = first(model, "processor").processor
    processor.scale = [0.5]  # as IP-Adapters have it
    snapshot = Snapshot(model)
    processor.scale[0] = 0.25
    assert not snapshot.holds()


def test_forwards_and_equal_settings_are_no_change(model):
    set_attention_provider(model, "native")
    snapshot = Snapshot(model)
    with torch.no_grad():
        model(**inputs(model))
        model(**inputs(model), joint_attention_kwargs={"scale": 0.5})
        model.proj_out.weight.add_(1)  # in its place: a graph reads it there
    model.set_adapters("style", weights=1.0)
    assert snapshot.holds()


def test_it_does_not_keep_the_model_alive():
    model = FluxTransformer2DModel.from_pretrained(FOLDER, local_files_only=True)
    snapshot, reference = Snapshot(model), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()
    assert snapshot.holds()


def test_surroundings():
    usual = surroundings()
    assert hash(usual) == hash(surroundings()) and usual == surroundings()
    for change in (attention_provider("native"), torch.inference_mode()):
        with change:
            assert surroundings() != usual
    assert surroundings() == usual


def test_it_is_refused_where_it_cannot_be(model):
    with pytest.raises(AttentionProviderError, match="is on cpu; CUDA graphs need"):
        apply_cuda_graphs(model)
    with pytest.raises(AttentionProviderError, match="given a str"):
        apply_cuda_graphs("flux")
    with pytest.raises(AttentionProviderError, match="max_graphs=0"):
        apply_cuda_graphs(model, max_graphs=0)
    model.forward = model.forward
    with pytest.raises(AttentionProviderError, match="was replaced, as offloading"):
        apply_cuda_graphs(model)
    del model.forward
    model.compile()
    with pytest.raises(AttentionProviderError, match="compiled as a whole"):
        apply_cuda_graphs(model)
    remove_cuda_graphs(model)  # of one that has none: nothing happens
