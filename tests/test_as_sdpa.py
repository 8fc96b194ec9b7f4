"""`native` gives the values and derivatives of `F.scaled_dot_product_attention` for every form of a call."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F

from diffusers_attn import AttentionProviderError, attention_dispatch, attention_provider
from diffusers_attn.dispatch import attend

sdpa = F.scaled_dot_product_attention


def grads(attention, tensors, rest, order=1):
    inputs = [each.clone().requires_grad_() for each in tensors]
    mask = rest["attn_mask"]
    if mask is not None and mask.is_floating_point():
        # A leaf that keeps strides of zero: each of its entries has a gradient of its own.
        mask = mask.detach().requires_grad_()
        inputs.append(mask)
    result = attention(*inputs[:3], **{**rest, "attn_mask": mask})
    for _ in range(order):
        weight = torch.linspace(-1.0, 1.0, result.numel(), dtype=result.dtype).reshape(result.shape)
        found = torch.autograd.grad((result * weight).sum(), inputs, create_graph=True, materialize_grads=True)
        result = torch.cat([each.flatten() for each in found])
    return found


def tangent(attention, tensors, rest):
    with fwad.dual_level():
        duals = [fwad.make_dual(each, each.cos()) for each in tensors]
        return (fwad.unpack_dual(attention(*duals, **rest)).tangent,)


DERIVATIVES = {
    "value": lambda *call: (call[0](*call[1], **call[2]),),
    "gradients": grads,
    "second order": lambda *call: grads(*call, order=2),
    "forward mode": tangent,
}


@st.composite
def calls(draw):
    """Shapes of two to five dimensions that differ in number and broadcast, sizes of zero, masks of all ranks."""
    size = st.sampled_from([0, 1, 2, 2, 3])
    batch = draw(st.lists(size, max_size=2))
    heads, gqa = draw(st.sampled_from([0, 1, 2, 4, 4])), draw(st.booleans())
    lengths = query_len, key_len = draw(st.sampled_from([0, 1, 3, 5])), draw(st.sampled_from([0, 1, 3, 5]))
    head_dim, value_dim = draw(st.sampled_from([0, 2, 8])), draw(st.sampled_from([0, 8, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def lead(heads):
        sizes = [*batch, heads]
        kept = sizes[draw(st.integers(0, len(sizes))) :] if heads == 1 and draw(st.booleans()) else sizes
        return [
            1 if draw(st.integers(0, 5)) == 0 and place < len(kept) - 1 else each for place, each in enumerate(kept)
        ]

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kv_heads = draw(st.sampled_from([heads, heads, 1, 2 if heads == 4 and gqa else heads]))
    query_heads = 1 if kv_heads == heads and not gqa and draw(st.integers(0, 4)) == 0 else heads
    tensors = [
        normal(*lead(query_heads), query_len, head_dim),
        normal(*lead(kv_heads), key_len, head_dim),
        normal(*lead(kv_heads), key_len, value_dim),
    ]
    mask = None
    form = draw(st.sampled_from([None, "bool", "bias", "expanded bias"]))
    if form is not None:
        sizes = [*batch, heads, *lengths]
        ndim = draw(st.integers(1, len(sizes)))
        shape = [each if draw(st.booleans()) else 1 for each in sizes][-ndim:]
        mask = normal(*shape) > -0.5 if form == "bool" else normal(*shape)
        if form == "expanded bias":
            mask = mask.expand(sizes)
    causal = draw(st.integers(0, 3)) == 0
    scale = draw(st.sampled_from([None, 0.3]))
    return tensors, {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": gqa}


@hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(call=calls(), times=st.sampled_from([1, 1, 3]))
def test_values_and_all_derivatives_are_those_of_pytorch(call, times):
    tensors, rest = call
    try:
        attention_dispatch(*tensors, **rest)
    except AttentionProviderError:
        # Where an input is empty, PyTorch does not look at the others.
        if all(each.numel() for each in tensors):
            with pytest.raises((RuntimeError, IndexError)):
                sdpa(*tensors, **rest)
        return
    try:
        sdpa(*tensors, **rest)
    except (RuntimeError, IndexError):
        return
    for name, derivative in DERIVATIVES.items():
        try:
            expected = derivative(sdpa, tensors, rest)
        except (RuntimeError, NotImplementedError):
            continue  # PyTorch has none for this kernel
        for _ in range(times):  # a call like an earlier one takes a shorter way
            found = derivative(attention_dispatch, tensors, rest)
        for want, got in zip(expected, found, strict=True):
            if not all(each.numel() for each in tensors) and got.shape != want.shape:
                # PyTorch does not broadcast where an input is empty: its result has the batch of the query.
                want = want.new_zeros(torch.broadcast_shapes(got.shape, want.shape))
            torch.testing.assert_close(got, want, msg=lambda details, name=name: f"{name}: {details}")


@pytest.mark.parametrize("provider", ["flex", "_native_math"])
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((4, 3, 8), (4, 4, 6, 8), (4, 4, 6, 8)),
        ((2, 1, 3, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
        ((2, 4, 3, 8), (2, 1, 6, 8), (2, 4, 6, 8)),
        ((2, 2, 4, 3, 8), (6, 8), (4, 6, 8)),
        ((2, 0, 3, 8), (2, 0, 6, 8), (2, 0, 6, 8)),
        ((2, 4, 3, 0), (2, 4, 6, 0), (2, 4, 6, 0)),
    ],
)
def test_other_providers_take_these_shapes_too(provider, query, key, value):
    tensors = [torch.randn(shape) for shape in (query, key, value)]
    with attention_provider(provider):
        torch.testing.assert_close(attention_dispatch(*tensors), sdpa(*tensors))


def test_heads_that_broadcast_in_the_layout_of_processors():
    query, key = torch.randn(2, 3, 1, 8), torch.randn(2, 6, 4, 8)
    expected = sdpa(*(tensor.transpose(1, 2) for tensor in (query, key, key))).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, key, layout="bshd"), expected)


def test_no_keys_give_zeros_whatever_the_queries_are():
    query = torch.full((1, 1, 70_000, 64), 60_000.0, dtype=torch.float16)
    query[..., 0] = math.inf
    none = torch.randn(1, 1, 0, 64, dtype=torch.float16)
    assert not attention_dispatch(query, none, none).any()
    inputs = [each.requires_grad_() for each in (query, none, none.clone())]
    for grad, each in zip(torch.autograd.grad(attention_dispatch(*inputs).sum(), inputs), inputs):
        assert grad.shape == each.shape and not grad.any()


@pytest.mark.parametrize("flag", ["is_causal", "enable_gqa"])
@pytest.mark.parametrize("value", [1, 0, None, torch.tensor(True)], ids=repr)
def test_what_is_no_bool_is_refused_however_often_it_is_given(flag, value):
    query = torch.randn(1, 2, 5, 8)
    for proper in (True, False, True, False):
        attention_dispatch(query, query, query, **{flag: proper})
        with pytest.raises(AttentionProviderError, match=f"{flag}=.*True or False"):
            attention_dispatch(query, query, query, **{flag: value})


def test_options_for_one_call():
    """`attention_kwargs` is the ninth argument, as in finetrainers."""
    query = torch.randn(1, 2, 5, 8)
    expected = sdpa(query, query, query)
    for given in (None, {}):
        torch.testing.assert_close(
            attention_dispatch(query, query, query, None, 0.0, False, None, False, given), expected
        )
    with attention_provider("auto"):
        torch.testing.assert_close(
            attention_dispatch(query, query, query, attention_kwargs={"lossy": "sage"}), expected
        )
        with pytest.raises(AttentionProviderError, match="provider 'auto' has no option 'window_size'"):
            attention_dispatch(query, query, query, attention_kwargs={"window_size": (1, 1)})
