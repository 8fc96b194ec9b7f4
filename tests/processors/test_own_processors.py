"""Processors that do more than diffusers' code with another attention call: Mochi and ACE-Step."""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import DispatchProcessor, attention_provider, set_attention_provider
from diffusers_attn.processors import ace_step, entry_points, mochi
from diffusers_attn.processors.binding import attention_modules_of
from diffusers_attn.processors.bound import bind
from diffusers_attn.scope import ProviderChoice

from ..zoo import CASES, relative_change


def close(result, expected):
    for ours, theirs in zip(result.values(), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


MASKS = {
    "padded": [[1] * 11 + [0] * 2, [1] * 5 + [0] * 8],
    "no text at all": [[0] * 13, [1] * 13],
    "padded on the left": [[0] * 2 + [1] * 11, [0] * 8 + [1] * 5],
    "gaps": [[1, 0] * 6 + [1], [0, 0, 1] * 4 + [1]],
    "whole": [[1] * 13] * 2,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_mochi_in_one_call_is_mochi(mask, routed):
    case = CASES["mochi"]
    model, inputs = case.build(), case.inputs()
    inputs["encoder_attention_mask"] = torch.tensor(mask).to(inputs["encoder_attention_mask"].dtype)
    expected = model(**inputs)
    model.set_attn_processor(DispatchProcessor("native"))
    close(model(**inputs), expected)
    assert len(routed) == len(list(attention_modules_of(model)))


@torch.no_grad()
def test_a_provider_without_masks_is_served_sample_by_sample(monkeypatch):
    """As by diffusers' own code: `_native_flash` takes no mask, and its calls get none."""
    case = CASES["mochi"]
    model = case.build()
    expected = model(**case.inputs())
    calls = []

    def attend(query, key, value, attn_mask=None, *args, layout, **kwargs):
        calls.append((layout, attn_mask))
        return torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask)

    for _, module in attention_modules_of(model):  # it does not run on a CPU, so a DispatchProcessor would refuse it
        module.processor = bind(module.processor, ProviderChoice.of("_native_flash"))
    monkeypatch.setattr(entry_points, "attend", attend)
    close(model(**case.inputs()), expected)
    assert calls == [("bhsd", None)] * 2 * len(list(attention_modules_of(model)))


def test_mochi_is_one_graph():
    case = CASES["mochi"]
    model = case.build()
    model.set_attn_processor(DispatchProcessor("native"))
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        expected = model(**case.inputs())
        torch._dynamo.reset()
        block = model.transformer_blocks[0]
        block.compile(backend=counter, fullgraph=True)
        close(model(**case.inputs()), expected)
        with attention_provider("_native_math"):
            close(model(**case.inputs()), expected)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_gradients_of_mochi():
    case = CASES["mochi"]
    model = case.build()
    grads = []
    for provider in (None, "native"):
        set_attention_provider(model, provider)
        loss = model(**case.inputs()).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for theirs, ours in zip(*grads):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@torch.no_grad()
def test_windows_of_ace_step(monkeypatch):
    """Through a provider with windows: no mask, and the window as its option. What the kernel would do stands in."""
    case = CASES["ace_step"]
    model = case.build()
    expected = model(**case.inputs())
    given = []

    def attend(query, key, value, attn_mask=None, dropout=0.0, causal=False, scale=None, gqa=False, *, bound, **kwargs):
        window = dict(bound.options).get("window_size") if bound is not None else None
        given.append((window, attn_mask is not None))
        if window is not None:
            place = torch.arange(query.shape[1])
            attn_mask = (place[:, None] - place).abs() <= window[0]
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        out = torch._C._nn.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2)

    windowed = {layer.self_attn.sliding_window for layer in model.layers} - {None}
    assert windowed and min(windowed) < 5, "the case has no window that is shorter than its sequence"
    modules = [module for _, module in attention_modules_of(model)]
    originals = [module.processor for module in modules]
    monkeypatch.setattr(entry_points, "attend", attend)
    for provider, masked in (("flash", False), ("native", True)):
        given.clear()
        for module, original in zip(modules, originals):
            module.processor = bind(original, ProviderChoice.of(provider))
        assert relative_change(model(**case.inputs()), expected) < 1e-5
        (window,) = windowed
        want = [(None, True) if masked else ((window, window), False)] * len(model.layers)
        kinds = [kind for kind in given if kind != (None, False)]
        assert kinds == want[: len(kinds)] and len(kinds) == sum(
            layer.self_attn.sliding_window is not None for layer in model.layers
        )


# Of the source that own code stands in for, or that runs with a part of its module replaced. Where one differs: read
# what has changed in diffusers, follow it in the file named, and write the new value here.
SOURCES = {
    MochiAttnProcessor2_0: (mochi, "56050b08e51df642"),
    AceStepAttnProcessor2_0: (ace_step, "51c45cb2194ad72d"),
}


@pytest.mark.parametrize("cls", SOURCES, ids=lambda cls: cls.__name__)
def test_what_own_code_stands_in_for_is_unchanged(cls):
    own, known = SOURCES[cls]
    found = hashlib.sha256(inspect.getsource(cls.__call__).encode()).hexdigest()[:16]
    assert found == known, f"{cls.__name__}.__call__ has changed: see {own.__name__}"
    assert own.PROCESSOR == f"{cls.__module__}.{cls.__qualname__}"
