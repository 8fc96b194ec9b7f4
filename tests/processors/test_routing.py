"""Every attention call of every model goes through the provider, and nothing else about the model changes."""

from __future__ import annotations

import pytest
import torch

from diffusers_attn import AttentionProviderError, DispatchProcessor, set_attention_provider
from diffusers_attn.processors import attention_modules
from diffusers_attn.processors.binding import attention_modules_of

from ..zoo import CASES, outputs, relative_change

NOT_BINDABLE = {"t5_film": "AttnProcessor .* get_attention_scores"}
FIXED = {"kandinsky6_sr": "flex"}  # its code asks for it, as no other takes its masks
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
    assert len(routed) == len(before)
    assert not after
    assert list(model.state_dict()) == keys
    # What is left out is listed, with the reason.
    blocked = {module.name for module in attention_modules(model) if module.obstacle}
    assert all((module.provider is None) == (module.name in blocked) for module in attention_modules(model))
    assert not blocked & set(before)

    set_attention_provider(model, None)
    assert identical(model(**case.inputs()), expected)
    assert len(routed) == len(before)
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
    assert routed == [FIXED.get(name, provider[module]) for module in calls]


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
