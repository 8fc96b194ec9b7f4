"""What processors call instead of diffusers' and PyTorch's attention functions: same arguments, same meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import TorchFunctionMode

from diffusers_attn import AttentionProviderError, DispatchProcessor, attention_provider, set_attention_provider
from diffusers_attn.processors.entry_points import dispatch_entry_point, sdpa_entry_point
from diffusers_attn.scope import ProviderChoice

from ..zoo import CASES, relative_change

MATH = ProviderChoice.of("_native_math")
BATCH, QUERIES, KEYS = 2, 5, 7


def tensors(*lengths):
    return [torch.randn(BATCH, length, 4, 16) for length in lengths]


def heads_first(*each):
    return [tensor.transpose(1, 2) for tensor in each]


ARGUMENTS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "causal": {"is_causal": True},
    "key mask": {"attn_mask": torch.rand(BATCH, 1, 1, KEYS) > 0.3},
    "bias": {"attn_mask": torch.randn(BATCH, 4, QUERIES, KEYS)},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("bound", [None, MATH], ids=str)
def test_both_agree_with_what_they_replace(bound, arguments):
    query, key, value = tensors(QUERIES, KEYS, KEYS)
    expected = dispatch_attention_fn(query, key, value, **arguments)
    assert torch.allclose(dispatch_entry_point(bound)(query, key, value, **arguments), expected, atol=1e-6)
    query, key, value = heads_first(query, key, value)
    found = sdpa_entry_point(bound)(query=query, key=key, value=value, **arguments)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, value, **arguments), atol=1e-6)


def test_grouped_heads():
    query, (key, value) = torch.randn(BATCH, QUERIES, 8, 16), tensors(KEYS, KEYS)
    found = dispatch_entry_point(MATH)(query, key, value, enable_gqa=True)
    assert torch.allclose(found, dispatch_attention_fn(query, key, value, enable_gqa=True), atol=1e-6)


def test_a_mask_of_two_dimensions():
    """diffusers' function takes [batch, key_len] for a key mask, PyTorch's takes [query_len, key_len]."""
    query, key, value = tensors(BATCH, KEYS, KEYS)  # as many queries as samples: nothing else tells them apart
    mask = torch.tensor([[True] * KEYS, [True] * 3 + [False] * (KEYS - 3)])
    by_key, by_query = mask[:, None, None, :], mask[None, None]
    ours = dispatch_entry_point(MATH)(query, key, value, mask)
    assert torch.allclose(ours, dispatch_attention_fn(query, key, value, mask), atol=1e-6)
    query, key, value = heads_first(query, key, value)
    assert torch.allclose(heads_first(ours)[0], F.scaled_dot_product_attention(query, key, value, by_key), atol=1e-6)
    found = sdpa_entry_point(MATH)(query, key, value, mask)
    assert torch.allclose(found, F.scaled_dot_product_attention(query, key, value, by_query), atol=1e-6)
    assert not torch.allclose(found, heads_first(ours)[0], atol=1e-2)


def test_attention_kwargs_are_options_of_the_provider(routed):
    call = dispatch_entry_point(ProviderChoice.of("auto"))
    query, key, value = tensors(QUERIES, KEYS, KEYS)
    expected = call(query, key, value)
    assert torch.equal(call(query, key, value, attention_kwargs={"lossy": ("sage",)}), expected)
    with pytest.raises(AttentionProviderError, match="no attention provider 'sages'"):
        call(query, key, value, attention_kwargs={"lossy": "sages"})
    with pytest.raises(AttentionProviderError, match="'_native_math' has no option 'window_size'"):
        dispatch_entry_point(MATH)(query, key, value, attention_kwargs={"window_size": (1, 1)})
    with attention_provider("native"), pytest.raises(AttentionProviderError, match="'native' has no option 'lossy'"):
        call(query, key, value, attention_kwargs={"lossy": ("sage",)})
    with attention_provider("auto"):
        assert torch.equal(
            dispatch_entry_point(MATH)(query, key, value, attention_kwargs={"lossy": ("sage",)}), expected
        )
    assert routed == ["auto"] * 3


@pytest.mark.parametrize("backend", [AttentionBackendName.FLEX, "flex"])
@pytest.mark.parametrize("scope", [None, "_native_math"])
def test_a_model_that_asks_for_flex_gets_it(backend, scope, routed):
    """The masks that such models bring are good for nothing else, whatever is bound or in scope."""
    query, key, value = tensors(128, 128, 128)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    expected = dispatch_attention_fn(query, key, value, is_causal=True)
    for bound in (None, MATH, ProviderChoice.of("flex")):
        if scope:
            with attention_provider(scope):
                found = dispatch_entry_point(bound)(query, key, value, mask, backend=backend)
        else:
            found = dispatch_entry_point(bound)(query, key, value, mask, backend=backend)
        assert torch.allclose(found, expected, atol=1e-5)
    assert routed == ["flex"] * 3


@torch.no_grad()
def test_another_backend_of_diffusers_is_refused_with_the_way_out(monkeypatch):
    # set_attention_backend also sets it for all models of the process, and nothing takes that back.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    case = CASES["flux"]
    model = case.build()
    expected = model(**case.inputs())
    message = (
        r"set_attention_backend\('_native_math'\).*reset_attention_backend\(\).*set_attention_provider\(model, None\)"
    )
    model.set_attention_backend("_native_math")
    with pytest.raises(AttentionProviderError, match=message):
        model.set_attn_processor(DispatchProcessor("_native_math"))
    model.reset_attention_backend()
    model.set_attn_processor(DispatchProcessor("_native_math"))
    assert relative_change(model(**case.inputs()), expected) < 1e-5
    with pytest.raises(AttentionProviderError, match=message):
        model.set_attention_backend("_native_math")
    assert relative_change(model(**case.inputs()), expected) < 1e-5
    set_attention_provider(model, None)
    model.set_attention_backend("_native_math")
    assert relative_change(model(**case.inputs()), expected) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "hunyuan_video"])  # no processor notes a backend; some do
@torch.no_grad()
def test_a_backend_is_refused_also_where_diffusers_would_not_note_it(name, monkeypatch, routed):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    case = CASES[name]
    model = case.build()
    model.set_attn_processor(DispatchProcessor("native"))
    for backend in ("_native_math", "flex"):
        with pytest.raises(AttentionProviderError, match=rf"set_attention_backend\('{backend}'\)"):
            model.set_attention_backend(backend)
    model(**case.inputs())
    assert set(routed) == {"native"}


@torch.no_grad()
def test_flex_is_honoured_where_all_processors_know_it(monkeypatch, routed):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    case = CASES["flux"]
    model = case.build()
    expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("native"))
    model.set_attention_backend("flex")
    assert relative_change(model(**case.inputs()), expected) < 1e-5
    assert set(routed) == {"flex"}


def test_diffusers_own_parallelism_is_refused_with_the_way_out():
    model = CASES["flux"].build()
    model.set_attn_processor(DispatchProcessor("native"))
    for processor in model.attn_processors.values():
        vars(processor)["_parallel_config"] = object()  # what enable_parallelism notes, which needs several devices
    with pytest.raises(AttentionProviderError, match=r"enable_parallelism\(\).*set_attention_provider\(model, None\)"):
        model(**CASES["flux"].inputs())


class Listening(TorchFunctionMode):
    """Records every function, and computes attention itself if `answer` is set."""

    def __init__(self, answer=False):
        super().__init__()
        self.answer = answer
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            if self.answer:
                return args[0] * 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["flux", "sd3"])  # one entry point each
@torch.no_grad()
def test_torch_function_modes_see_the_call_and_pass_it_on(name, routed):
    case = CASES[name]
    model = case.build()
    model.set_attn_processor(DispatchProcessor("_native_math"))
    expected = model(**case.inputs())
    calls, _ = len(routed), routed.clear()
    outer, inner = Listening(), Listening()
    with outer, inner, torch.device("cpu"):
        found = model(**case.inputs())
        assert torch._C._len_torch_function_stack() == 3
    assert relative_change(found, expected) < 1e-6
    assert outer.calls == inner.calls == calls
    assert routed == ["_native_math"] * calls
    with Listening(), Listening(answer=True):
        assert relative_change(model(**case.inputs()), expected) > 0.1
    assert len(routed) == calls
    assert torch._C._len_torch_function_stack() == 0


def test_modes_are_restored_after_an_error():
    mode = Listening()
    with mode:
        with pytest.raises(AttentionProviderError):
            sdpa_entry_point(MATH)(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5))
        assert torch.overrides._get_current_function_mode_stack() == [mode]


@torch.no_grad()
def test_a_default_device_is_no_reason_for_a_detour(routed, monkeypatch):
    from diffusers_attn.processors import entry_points

    monkeypatch.setattr(entry_points, "_through_modes", None)
    query, key, value = tensors(QUERIES, KEYS, KEYS)
    with torch.device("cpu"):
        dispatch_entry_point(MATH)(query, key, value)
        sdpa_entry_point(MATH)(*heads_first(query, key, value))
    assert len(routed) == 2


@pytest.mark.parametrize("provider", ["native", "_native_math"])
@torch.no_grad()
def test_guidance_by_skipping_attention_scores(provider):
    """diffusers' hook for it catches F.scaled_dot_product_attention by a mode, and looks the processor's class up."""
    case = CASES["cogview4"]
    skipped, bound = case.build(), case.build()
    untouched = skipped(**case.inputs())
    bound.set_attn_processor(DispatchProcessor(provider))
    for model in (skipped, bound):
        skip = LayerSkipConfig([0], "transformer_blocks", False, skip_attention_scores=True, skip_ff=False)
        apply_layer_skip(model, skip)
    expected = skipped(**case.inputs())
    assert relative_change(expected, untouched) > 1e-2
    assert relative_change(bound(**case.inputs()), expected) < 1e-5
