"""attention_dispatch: results by definition, and errors for calls that it does not serve."""

import math
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.dispatch import attend

from . import reference

PROVIDERS = ("native", "_native_math", "flex", "auto")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@st.composite
def calls(draw):
    """Everything that may come: shapes, dtypes, masks of every form, scales, GQA, unequal lengths."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    query_len, key_len = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 24]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    form = draw(st.sampled_from([None, "bool", "bool", "bias", "bias with -inf"]))
    mask = None
    if form is not None:
        full = (batch, heads, query_len, key_len)
        ndim = draw(st.integers(1, 4))
        shape = tuple(size if draw(st.booleans()) else 1 for size in full)[4 - ndim :]
        mask = torch.rand(shape, generator=generator) > 0.4
        if form != "bool":
            bias = torch.randn(shape, generator=generator).to(dtype)
            mask = bias if form == "bias" else bias.masked_fill(~mask, -math.inf)
    return {
        "query": torch.randn(batch, heads, query_len, head_dim, generator=generator).to(dtype),
        "key": torch.randn(batch, kv_heads, key_len, head_dim, generator=generator).to(dtype),
        "value": torch.randn(batch, kv_heads, key_len, head_dim, generator=generator).to(dtype),
        "attn_mask": mask,
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, None, 0.3, 1.0])),
        "enable_gqa": heads != kv_heads,
    }


@pytest.mark.parametrize("provider", [provider for provider in PROVIDERS if provider != "flex"])
@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=calls())
def test_the_result_is_that_of_the_definition(provider, call):
    check_against_the_definition(provider, call)


@pytest.mark.slow  # more than a second each: a mask is traced anew
@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=calls())
def test_flex_gives_the_result_of_the_definition(call):
    hypothesis.assume(call["query"].dtype != torch.float64)
    check_against_the_definition("flex", call)


def check_against_the_definition(provider, call):
    expected, _ = reference.attention(
        *(call[name] for name in ("query", "key", "value", "attn_mask", "is_causal", "scale"))
    )
    with attention_provider(provider), torch.no_grad():
        for layout in ("bhsd", "bshd"):
            tensors = [call[name] for name in ("query", "key", "value")]
            if layout == "bshd":
                tensors = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
            rest = {name: call[name] for name in ("attn_mask", "is_causal", "scale", "enable_gqa")}
            out = attend(*tensors, **rest, layout=layout)
            out = out if layout == "bhsd" else out.transpose(1, 2)
            assert out.dtype == call["query"].dtype
            # Against the values' size: where they cancel, rounding of the inputs alone exceeds the result's.
            error = (out.double() - expected).abs().max().item()
            assert error < TOLERANCE[out.dtype] * call["value"].abs().max().item(), layout


@pytest.mark.parametrize("provider", ["native", "_native_math"])
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=calls())
def test_gradients_are_those_of_the_definition(provider, call):
    names = ("query", "key", "value")
    call = {name: tensor.double() if name in names else tensor for name, tensor in call.items()}
    if call["attn_mask"] is not None and call["attn_mask"].dtype != torch.bool:
        call["attn_mask"] = call["attn_mask"].double()
    grads = []
    for function in (lambda **call: reference.attention(**call)[0], attention_dispatch):
        inputs = {name: call[name].clone().requires_grad_() for name in names}
        rest = {name: value for name, value in call.items() if name not in names}
        if function is not attention_dispatch:
            rest["mask"] = rest.pop("attn_mask")
            rest.pop("enable_gqa")
        with attention_provider(provider):
            out = function(**inputs, **rest)
        weight = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).reshape(out.shape)
        grads.append(torch.autograd.grad((out * weight).sum(), tuple(inputs.values())))
    for expected, found in zip(*grads):
        assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_bias_may_be_float32_beside_half_precision(provider):
    query, key, value = torch.randn(3, 1, 2, 6, 8).bfloat16()
    bias = torch.randn(1, 1, 1, 6)
    with attention_provider(provider):
        out = attention_dispatch(query, key, value, bias)
        with pytest.raises(AttentionProviderError, match="float16 and the query torch.bfloat16.*mask.to"):
            attention_dispatch(query, key, value, bias.half())
    assert reference.relative_error(out, reference.attention(query, key, value, bias)[0]) < 1e-2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_row_without_keys_gives_zeros(provider):
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 3] = False
    mask[1] = False
    with attention_provider(provider):
        out = attention_dispatch(query, key, value, mask)
    assert not out.isnan().any()
    assert not out[0, :, 3].any() and not out[1].any() and out[0, :, 2].any()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("query_len", "key_len"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to(provider, query_len, key_len):
    query = torch.randn(2, 3, query_len, 8, requires_grad=provider != "flex")
    key, value = torch.randn(2, 2, 3, key_len, 8)
    with attention_provider(provider):
        out = attention_dispatch(query, key, value)
    assert out.shape == (2, 3, query_len, 8) and not out.any()
    if query.requires_grad:
        assert not torch.autograd.grad(out.sum(), query)[0].any()


@pytest.mark.parametrize("provider", ["native", "_native_math", "auto"])
def test_the_bias_gets_its_gradient(provider):
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    bias = torch.randn(1, 2, 5, 5, requires_grad=True)
    with attention_provider(provider):
        (found,) = torch.autograd.grad(attention_dispatch(query, key, value, bias).pow(2).sum(), bias)
    (expected,) = torch.autograd.grad(reference.attention(query, key, value, bias)[0].pow(2).sum(), bias)
    assert torch.allclose(found, expected.float(), atol=1e-5)


def test_a_bias_gradient_that_nobody_would_compute_is_refused():
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    bias = torch.randn(5, 5, requires_grad=True)
    with attention_provider("flex"), pytest.raises(AttentionProviderError, match="no gradient of attn_mask.*native"):
        attention_dispatch(query, key, value, bias)


def test_flex_takes_a_block_mask_and_others_name_it():
    def window(batch, head, query, key):
        return (query - key).abs() <= 2

    query, key, value = torch.randn(3, 1, 2, 128, 8)
    block_mask = create_block_mask(window, 1, 1, 128, 128, device="cpu")
    place = torch.arange(128)
    expected, _ = reference.attention(query, key, value, (place[:, None] - place).abs() <= 2)
    with attention_provider("flex"):
        out = attention_dispatch(query, key, value, block_mask)
    assert reference.relative_error(out, expected) < 2e-6
    with pytest.raises(AttentionProviderError, match="block mask.*support it: flex"):
        attention_dispatch(query, key, value, block_mask)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 2, 3, 5, 8)])
def test_any_number_of_batch_dimensions(shape):
    query, key, value = torch.randn(3, *shape)
    mask = torch.rand(5, 5) > 0.3
    expected = F.scaled_dot_product_attention(query, key, value, mask).nan_to_num(0.0)
    assert torch.allclose(attention_dispatch(query, key, value, mask), expected, atol=1e-6)


def test_batch_sizes_of_one_broadcast_as_in_sdpa():
    query, key, value = torch.randn(3, 4, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(3, 1, 7, 8)
    expected = F.scaled_dot_product_attention(query, key.expand(3, 4, 7, 8), value.expand(3, 4, 7, 8))
    for provider in ("native", "_native_math", "flex"):
        with attention_provider(provider):
            assert torch.allclose(attention_dispatch(query, key, value), expected, atol=1e-6)


def test_values_of_another_head_dim():
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention_dispatch(query, key, value), expected, atol=1e-6)
    with attention_provider("flex"), pytest.raises(AttentionProviderError, match="head_dim of its query"):
        attention_dispatch(query, key, value)


def test_it_takes_the_place_of_sdpa(monkeypatch):
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    tokens = torch.randn(2, 5, 16)
    expected = attention(tokens, tokens, tokens, need_weights=False)[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_dispatch)
    assert torch.equal(attention(tokens, tokens, tokens, need_weights=False)[0], expected)
    with attention_provider("_native_math"):
        assert torch.allclose(attention(tokens, tokens, tokens, need_weights=False)[0], expected, atol=1e-6)


def test_autocast_leaves_float64_and_other_devices_alone():
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (each(query, query, query) for each in (attention_dispatch, F.scaled_dot_product_attention))
    assert found.dtype == expected.dtype == torch.float64 and torch.equal(found, expected)
    query = query.float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert attention_dispatch(query, query, query).dtype == torch.float32


def test_autocast_is_followed_as_sdpa_follows_it():
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    value = value.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key, value)
        assert torch.equal(attention_dispatch(query, key, value), expected)
        assert expected.dtype == torch.bfloat16


def test_dropout_drops_and_is_refused_where_it_cannot_be():
    query, key = torch.randn(2, 1, 1, 64, 8)
    value = torch.ones(1, 1, 64, 8)
    for provider in ("native", "_native_math"):
        with attention_provider(provider):
            out = attention_dispatch(query, key, value, dropout_p=0.5)
        assert out.std() > 0.01 and abs(out.mean().item() - 1.0) < 0.2
    with attention_provider("flex"), pytest.raises(AttentionProviderError, match="no dropout"):
        attention_dispatch(query, key, value, dropout_p=0.5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": torch.randn(1, 2, 5, 4)}, "one head_dim"),
        ({"key": torch.randn(1, 2, 6, 8)}, "one length"),
        ({"key": torch.randn(1, 3, 5, 8)}, "one number of heads"),
        ({"key": torch.randn(3, 2, 5, 8), "query": torch.randn(2, 2, 5, 8)}, "batch sizes"),
        ({"key": torch.randn(1, 2, 5, 8, dtype=torch.float64)}, "one dtype"),
        # Another length than elsewhere: an index, which is all that a repeated call is checked for, is -1 for both.
        ({"key": torch.randn(1, 2, 6, 8, device="meta"), "value": torch.randn(1, 2, 6, 8)}, "one device"),
        ({"query": torch.randn(1, 4, 5, 8)}, "enable_gqa"),
        ({"query": torch.randn(1, 4, 5, 8), "key": torch.randn(1, 3, 5, 8), "enable_gqa": True}, "that divides"),
        ({"key": torch.randn(8)}, "at least two dimensions"),
        (
            {"query": torch.randn(2, 3, 2, 5, 8), "attn_mask": torch.ones(2, 2, 1, 5, 5) > 0},
            "does not broadcast to the",
        ),
    ],
)
def test_tensors_that_do_not_belong_together(change, problem):
    tensors = {name: torch.randn(1, 2, 5, 8) for name in ("query", "key", "value")}
    with pytest.raises(AttentionProviderError, match=problem):
        attention_dispatch(**{**tensors, **change})


def test_a_mask_elsewhere_is_refused_however_often_its_like_was_served():
    query = torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    attention_dispatch(query, query, query, mask)
    with pytest.raises(AttentionProviderError, match="attn_mask is on meta and query on cpu"):
        attention_dispatch(query, query, query, mask.to("meta"))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5])
def test_a_dropout_that_is_no_probability_is_refused(dropout_p):
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(AttentionProviderError, match=f"dropout_p={dropout_p}"):
        attention_dispatch(query, query, query, dropout_p=dropout_p)


def test_heads_that_do_not_divide_are_refused():
    query, key = torch.randn(1, 5, 4, 8), torch.randn(1, 2, 4, 8)
    with pytest.raises(AttentionProviderError, match="5 query heads do not divide"):
        attention_dispatch(query, key, key, enable_gqa=True)


def test_keys_and_values_may_have_different_numbers_of_heads():
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 4))
    expected, _ = reference.attention(query, key.repeat_interleave(2, dim=1), value)
    torch.testing.assert_close(attention_dispatch(query, key, value, enable_gqa=True), expected)


def test_a_repeated_call_is_checked_too():
    """The second call of a kind is served from what was prepared for the first; another kind must not be."""
    tensors = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with attention_provider("flex"):
        attention_dispatch(*tensors)
        attention_dispatch(*tensors)
        with pytest.raises(AttentionProviderError, match="no backward on cpu"):
            attention_dispatch(tensors[0].requires_grad_(), *tensors[1:])
        with pytest.raises(AttentionProviderError, match="float64|it takes"):
            attention_dispatch(*(tensor.detach().double() for tensor in tensors))


@pytest.mark.parametrize("options", [{"dropout_p": None}, {"dropout_p": "0.1"}, {"scale": "1"}])
def test_what_is_no_number_is_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(AttentionProviderError, match=re.escape(f"{name}={value!r} was given; a ")):
        attention_dispatch(*torch.randn(3, 1, 2, 5, 8), **options)
