"""Processors that users, diffusers and this library set on a bound model, in any order."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import Flux2KleinKVPipeline

from diffusers_attn import AttentionProviderError, DispatchProcessor, ProviderUnavailableError, set_attention_provider
from diffusers_attn.processors import attention_modules
from diffusers_attn.processors.binding import attention_modules_of

from ..zoo import CASES, relative_change


def providers(model):
    return {module.provider for module in attention_modules(model)}


def by_diffusers(function, *args):
    """Call `function` as code of diffusers would: from a module of that name."""
    namespace = {"__name__": "diffusers.pipelines.another", "function": function, "args": args}
    exec("function(*args)", namespace)


@pytest.fixture
def flux():
    return CASES["flux"].build()


@pytest.fixture
def unet():
    return CASES["sd15"].build()


def test_the_same_request_on_two_models(flux, routed):
    other = CASES["flux"].build()
    request = DispatchProcessor("_native_math")
    flux.set_attn_processor(request)
    other.set_attn_processor(request)
    set_attention_provider(other, "native")
    assert providers(flux) == {"_native_math"} and providers(other) == {"native"}
    with torch.no_grad():
        assert relative_change(flux(**CASES["flux"].inputs()), other(**CASES["flux"].inputs())) < 1e-5
    assert set(routed[: len(routed) // 2]) == {"_native_math"} and set(routed[len(routed) // 2 :]) == {"native"}


def test_two_models_that_share_a_processor_object():
    models = [CASES["flux"].build(), CASES["flux"].build()]
    shared = FluxAttnProcessor()
    for model in models:
        model.set_attn_processor(shared)
    set_attention_provider(models[0], "native")
    assert providers(models[0]) == {"native"} and providers(models[1]) == {None}
    set_attention_provider(models[0], None)
    assert all(processor is shared for model in models for processor in model.attn_processors.values())


def test_one_module_alone(flux):
    flux.transformer_blocks[0].attn.set_processor(DispatchProcessor("native"))
    assert [module.provider for module in attention_modules(flux)] == ["native", None, None, None]


def test_some_modules_by_name(flux):
    processors = flux.attn_processors
    processors["transformer_blocks.1.attn.processor"] = DispatchProcessor("native")
    flux.set_attn_processor(processors)
    assert [module.provider for module in attention_modules(flux)] == [None, "native", None, None]


def test_processors_that_are_read_can_be_set_again(flux):
    flux.set_attn_processor(DispatchProcessor("native"))
    first = flux.attn_processors
    set_attention_provider(flux, "_native_math")
    second = flux.attn_processors
    flux.set_attn_processor(dict(first))
    assert providers(flux) == {"native"} and flux.attn_processors == first
    flux.set_attn_processor(dict(second))
    assert providers(flux) == {"_native_math"} and flux.attn_processors == second
    set_attention_provider(flux, None)
    flux.set_attn_processor(first)
    assert providers(flux) == {"native"}


def test_the_choice_is_changed_on_the_same_originals(flux):
    originals = flux.attn_processors
    for provider in ("native", "_native_math", "native"):
        set_attention_provider(flux, provider)
        assert providers(flux) == {provider}
    set_attention_provider(flux, None)
    set_attention_provider(flux, None)
    assert flux.attn_processors == originals


def test_a_plain_processor_from_the_user_takes_the_model_back(flux):
    flux.set_attn_processor(DispatchProcessor("native"))
    mine = FluxAttnProcessor()
    flux.set_attn_processor(mine)
    assert all(processor is mine for processor in flux.attn_processors.values())
    flux.fuse_qkv_projections()
    by_diffusers(flux.set_attn_processor, FluxAttnProcessor())
    assert providers(flux) == {None}


def test_a_plain_processor_from_diffusers_is_bound(unet):
    unet.set_attn_processor(DispatchProcessor("native"))
    fused = FusedAttnProcessor2_0()
    by_diffusers(unet.set_attn_processor, fused)
    assert providers(unet) == {"native"}
    assert all(processor.original is fused for processor in unet.attn_processors.values())
    by_diffusers(unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor, AttnProcessor2_0())
    assert providers(unet) == {"native"}


def test_diffusers_putting_bound_processors_back_does_not_bind(unet):
    unet.set_attn_processor(DispatchProcessor("native"))
    bound = unet.attn_processors
    set_attention_provider(unet, None)
    originals = unet.attn_processors
    by_diffusers(unet.set_attn_processor, bound)
    assert unet.attn_processors == originals


def test_diffusers_putting_processors_back_keeps_the_latest_choice(unet):
    unet.set_attn_processor(DispatchProcessor("native"))
    unet.fuse_qkv_projections()  # keeps the processors, bound as they are, for unfuse
    set_attention_provider(unet, "_native_math")
    unet.unfuse_qkv_projections()
    assert providers(unet) == {"_native_math"}
    assert {module.processor for module in attention_modules(unet)} == {"AttnProcessor2_0"}


def test_processors_that_were_swapped_behind_our_back_come_back_bound(unet):
    """As perturbed attention guidance does it: assign, run, restore."""
    unet.set_attn_processor(DispatchProcessor("native"))
    before = unet.attn_processors
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = PAGIdentitySelfAttnProcessor2_0()
    by_diffusers(unet.set_attn_processor, dict(before))
    assert providers(unet) == {"native"} and unet.attn_processors == before


@torch.no_grad()
def test_default_processors_take_the_model_back(unet):
    expected = unet(**CASES["sd15"].inputs())
    unet.set_attn_processor(DispatchProcessor("native"))
    unet.set_default_attn_processor()  # compares classes exactly
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}
    assert relative_change(unet(**CASES["sd15"].inputs()), expected) < 1e-5
    by_diffusers(unet.set_attn_processor, AttnProcessor2_0())
    assert providers(unet) == {None}


def test_a_replacement_that_cannot_be_bound_warns_and_is_not_the_end(unet):
    unet.set_attn_processor(DispatchProcessor("native"))
    with pytest.warns(UserWarning, match="SlicedAttnProcessor calls neither .* does not use provider 'native'"):
        unet.set_attention_slice("max")
    assert providers(unet) == {None}
    unet.set_attention_slice(None)
    assert providers(unet) == {"native"}


def test_a_module_that_cannot_be_bound_is_refused_by_itself():
    sana = CASES["sana"].build()
    linear = sana.transformer_blocks[0].attn1
    original = linear.processor
    with pytest.raises(AttentionProviderError, match="SanaLinearAttnProcessor2_0 calls neither"):
        linear.set_processor(DispatchProcessor("native"))
    assert linear.processor is original
    sana.set_attn_processor(dict.fromkeys(sana.attn_processors, DispatchProcessor("native")))
    assert linear.processor is original
    blocked = [module for module in attention_modules(sana) if module.provider is None]
    assert {module.processor for module in blocked} == {"SanaLinearAttnProcessor2_0"}
    assert all("neither dispatch_attention_fn nor" in module.obstacle for module in blocked)


def test_wrong_names_are_diffusers_own_errors(flux):
    requests = dict.fromkeys(["nowhere", *list(flux.attn_processors)[1:]], DispatchProcessor("native"))
    with pytest.raises(KeyError):
        flux.set_attn_processor(requests)
    with pytest.raises(ValueError, match="does not match"):
        flux.set_attn_processor({"nowhere": DispatchProcessor("native")})


def test_kv_caches_of_flux2(routed):
    """The pipeline sets other processors, whose calls are in a helper function; on modules, and not on the model."""
    case = CASES["flux2"]
    model = case.build()
    pipeline = Flux2KleinKVPipeline.__new__(Flux2KleinKVPipeline)
    object.__setattr__(pipeline, "transformer", model)
    set_attention_provider(model, "native")
    pipeline._set_kv_attn_processors()
    assert {module.processor for module in attention_modules(model)} == {
        "Flux2KVAttnProcessor",
        "Flux2KVParallelSelfAttnProcessor",
    }
    assert providers(model) == {"native"}
    with torch.no_grad():
        result = model(**case.inputs())
        assert len(routed) == len(attention_modules(model))
        set_attention_provider(model, None)
        assert relative_change(result, model(**case.inputs())) < 1e-6


def test_a_request_is_not_a_processor(flux):
    flux.transformer_blocks[0].attn.processor = DispatchProcessor("native")
    with pytest.raises(AttentionProviderError, match="set_attn_processor"):
        flux(**CASES["flux"].inputs())
    with pytest.raises(AttentionProviderError, match="no processor"):
        Attention(8, processor=DispatchProcessor("native"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("flush",), {}, AttentionProviderError, "no attention provider 'flush'.*flash"),
        (("native",), {"deterministic": True}, AttentionProviderError, "no option 'deterministic'"),
        ((), {"deterministic": True}, AttentionProviderError, "no provider is given"),
        (("sage",), {}, ProviderUnavailableError, "pip install"),
    ],
)
def test_requests_are_checked_when_they_are_made(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DispatchProcessor(*arguments, **options)


def test_modules_that_are_not_bound_are_left_alone(flux):
    """Other models, before and after: no note, no view, no other processor object."""
    CASES["flux"].build().set_attn_processor(DispatchProcessor("native"))
    processor = FluxAttnProcessor()
    flux.set_attn_processor(processor)
    for _, module in attention_modules_of(flux):
        assert module.processor is processor
        assert not [name for name in vars(module) if "provider" in name]
