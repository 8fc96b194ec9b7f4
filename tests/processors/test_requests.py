"""Backends and parallelism that were asked of diffusers, found when a provider takes the place of its attention."""

import types

import pytest
import torch
from diffusers import ContextParallelConfig, attention_backend
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from diffusers_attn import AttentionProviderError, DispatchProcessor, attention_provider, set_attention_provider
from diffusers_attn.parallelize.targets import find_targets
from tests.zoo import CASES


@pytest.fixture(autouse=True)
def keep_backend_of_the_process(monkeypatch):
    # set_attention_backend also sets it for all models of the process, and nothing takes that back.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


def note_parallelism(model):
    """What enable_parallelism notes before it sets hooks. It needs several devices."""
    config = types.SimpleNamespace(context_parallel_config=ContextParallelConfig(ring_degree=2))
    model._parallel_config = config
    for processor in model.attn_processors.values():
        processor._parallel_config = config


BACKEND = r"set_attention_backend\('_native_math'\)"
ASKED = {
    "a backend": (
        lambda model: model.set_attention_backend("_native_math"),
        BACKEND,
    ),
    "parallelism": (note_parallelism, r"enable_parallelism\(\)"),
    "a backend of one module": (
        lambda model: model.single_transformer_blocks[-1].attn.set_attention_backend("_native_math"),
        BACKEND,
    ),
}
WAYS = {
    "set_attention_provider": lambda model: set_attention_provider(model, "native"),
    "set_attn_processor": lambda model: model.set_attn_processor(DispatchProcessor("native")),
    "enable_context_parallel": lambda model: find_targets(model, None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", ASKED)
def test_asked_before(asked, way):
    model = CASES["flux"].build()
    ask, message = ASKED[asked]
    ask(model)
    before = dict(model.attn_processors)
    with pytest.raises(AttentionProviderError, match=message):
        WAYS[way](model)
    assert dict(model.attn_processors) == before


def test_of_a_pipeline_nothing_is_bound():
    models = [CASES["flux"].build(), CASES["flux"].build()]
    models[1].set_attention_backend("_native_math")
    pipeline = types.SimpleNamespace(components={"transformer": models[0], "controlnet": models[1]})
    with pytest.raises(AttentionProviderError, match="set_attention_backend"):
        set_attention_provider(pipeline, "native")
    assert not any(hasattr(each, "choice") for each in models[0].attn_processors.values())


@pytest.mark.parametrize("asked", ASKED)
def test_asked_later_is_refused_at_once(asked):
    model = CASES["flux"].build()
    model.set_attn_processor(DispatchProcessor("native"))
    ask, message = ASKED[asked]
    with pytest.raises(AttentionProviderError, match=message):
        ask(model)
    for processor in model.attn_processors.values():
        assert processor._attention_backend is None and processor._parallel_config is None


def test_enable_parallelism_is_refused_before_it_notes_anything():
    model = CASES["flux"].build()
    model.set_attn_processor(DispatchProcessor("native"))
    with pytest.raises(AttentionProviderError, match=r"enable_parallelism\(\).*set_attention_provider\(model, None\)"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    assert model._parallel_config is None


def test_flex_is_a_provider_as_well():
    model = CASES["flux"].build()
    model.set_attention_backend("flex")
    model.set_attn_processor(DispatchProcessor("native"))


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_scope_of_diffusers_around_a_bound_model(compiled):
    """It is refused, unless it names the provider that the model has anyway."""
    model, inputs = CASES["flux"].build(), CASES["flux"].inputs()
    expected = model(**inputs).sample
    CASES["flux"].build().set_attention_backend("_native_math")  # diffusers notes that for all models, for good
    set_attention_provider(model, "native")
    if compiled:
        model.transformer_blocks[0].compile(fullgraph=True, backend="eager")
    for _ in range(2):
        with attention_backend("native"):
            assert torch.allclose(model(**inputs).sample, expected)
            message = r"attention_backend\('_native_math'\).*provider 'native'.*attention_provider\('_native_math'\)"
            with attention_backend("_native_math"), pytest.raises(AttentionProviderError, match=message):
                model(**inputs)
            assert torch.allclose(model(**inputs).sample, expected)
        assert torch.allclose(model(**inputs).sample, expected)
    # What the message says is so.
    with attention_backend("_native_math"), attention_provider("_native_math"):
        assert torch.allclose(model(**inputs).sample, expected, atol=1e-5)
    set_attention_provider(model, None)
    with attention_backend("_native_math"):
        assert torch.allclose(model(**inputs).sample, expected, atol=1e-5)
