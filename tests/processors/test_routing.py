"""Every attention call of every model goes through the provider, and nothing else about the model changes."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from diffusers_attn import AttentionProviderError, DispatchProcessor, set_attention_provider
from diffusers_attn.processors import attention_modules
from diffusers_attn.processors.binding import attention_modules_of

from ..zoo import CASES, outputs, relative_change

NOT_BINDABLE = {"t5_film": "AttnProcessor .* get_attention_scores"}
# Modules whose code asks for flex, as no other takes their masks.
FLEX = {"kandinsky6_sr": "*", "anyflow_far": "*.attn1"}
# diffusers' processor calls attention once per sample, and a bound one once.
ONE_CALL = {"mochi"}
BINDABLE = [name for name in CASES if name not in NOT_BINDABLE]


def close(result, expected, tolerance=2e-5):
    return all(
        torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(outputs(result), outputs(expected), strict=True)
    )


def identical(result, expected):
    return all(map(torch.equal, outputs(result), outputs(expected)))


@pytest.mark.parametrize("name", BINDABLE)
@torch.no_grad()
def test_every_call_is_routed_and_undone_exactly(name, routed, own_calls):
    case = CASES[name]
    model = case.build()
    originals = [module.processor for _, module in attention_modules_of(model)]
    keys = list(model.state_dict())
    with own_calls(model) as before:
        expected = model(**case.inputs())
    assert before

    model.set_attn_processor(DispatchProcessor("native"))
    with own_calls(model) as after:
        result = model(**case.inputs())
    assert close(result, expected)
    calls = len(set(before)) if name in ONE_CALL else len(before)
    assert len(routed) == calls
    assert not after
    assert list(model.state_dict()) == keys
    # What is left out is listed, with the reason.
    blocked = {module.name for module in attention_modules(model) if module.obstacle}
    assert all((module.provider is None) == (module.name in blocked) for module in attention_modules(model))
    assert not blocked & set(before)

    set_attention_provider(model, None)
    assert identical(model(**case.inputs()), expected)
    assert len(routed) == calls
    now = [module.processor for _, module in attention_modules_of(model)]
    assert all(ours is theirs for ours, theirs in zip(now, originals, strict=True))


@pytest.mark.parametrize("name", BINDABLE)
@torch.no_grad()
def test_two_providers_in_one_model(name, routed, own_calls):
    case = CASES[name]
    model = case.build()
    with own_calls(model) as calls:
        expected = model(**case.inputs())
    provider = {module: ("native", "_native_math")[index % 2] for index, module in enumerate(dict.fromkeys(calls))}
    processors = {
        module: DispatchProcessor(provider.get(module.removesuffix(".processor"), "native"))
        for module in model.attn_processors
    }
    given = dict(processors)
    model.set_attn_processor(processors)
    assert processors == given  # diffusers would have emptied it
    assert relative_change(model(**case.inputs()), expected) < 1e-4
    calls = list(dict.fromkeys(calls)) if name in ONE_CALL else calls
    flex = FLEX.get(name, "")
    assert routed == ["flex" if fnmatch.fnmatch(module, flex) else provider[module] for module in calls]


@pytest.mark.parametrize("name", NOT_BINDABLE)
def test_a_model_without_a_call_to_route_is_refused_and_left_alone(name):
    model = CASES[name].build()
    originals = model.attn_processors
    for bind in (
        lambda: model.set_attn_processor(DispatchProcessor("native")),
        lambda: model.set_attn_processor({name: DispatchProcessor("native") for name in originals}),
        lambda: set_attention_provider(model, "native"),
    ):
        with pytest.raises(AttentionProviderError, match=f"{type(model).__name__} .*{NOT_BINDABLE[name]}"):
            bind()
    assert model.attn_processors == originals


def test_a_model_without_attention_is_refused():
    from diffusers import T2IAdapter

    with pytest.raises(AttentionProviderError, match="T2IAdapter .*no attention modules"):
        T2IAdapter(channels=(8, 8, 8, 8), num_res_blocks=1).set_attn_processor(DispatchProcessor("native"))


@torch.no_grad()
def test_a_controlnet_that_runs_on_modules_of_its_transformer(routed, own_calls):
    """ZImageControlNetModel: bound by itself, it binds what it shares."""
    from diffusers import ZImageControlNetModel

    case = CASES["zimage"]
    transformer = case.build()
    torch.manual_seed(0)
    model = ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0, 1],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=64,
        n_heads=4,
        n_kv_heads=4,
    )
    ZImageControlNetModel.from_transformer(model, transformer)
    inputs = case.inputs()
    inputs["control_context"] = [torch.randn(*latents.shape) for latents in inputs["x"]]
    with own_calls(model) as before:
        expected = model(**inputs)
    model.set_attn_processor(DispatchProcessor("native"))
    with own_calls(model) as after:
        result = model(**inputs)
    assert before and not after and len(routed) == len(before)
    assert close(list(result.values()), list(expected.values()))
