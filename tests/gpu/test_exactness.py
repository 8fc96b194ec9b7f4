"""Every usable provider against the definition of attention, in float64: output, gradients, lse, partial sums."""

import math

import pytest
import torch

from diffusers_attn import attention_dispatch, attention_provider
from diffusers_attn.masks import classify
from diffusers_attn.providers.base import Params
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.hub import source_of
from diffusers_attn.providers.registry import load

from .. import reference
from .cases import (
    CASES,
    GRAD_TOLERANCE,
    LOSSY_LSE_TOLERANCE,
    LSE_TOLERANCE,
    NAMED,
    exact_tolerance,
    provider_cases,
    serves,
)

pytestmark = pytest.mark.gpu


def dispatch(provider, case, inputs, mask):
    gqa = case.heads != case.kv_heads
    with attention_provider(provider):
        return attention_dispatch(*inputs, mask, is_causal=case.causal, enable_gqa=gqa)


def name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("provider", "case"), provider_cases())
def test_output(provider, case, record):
    inputs, mask = case.inputs(), case.make_mask()
    out = dispatch(provider, case, inputs, mask)
    expected, lse = reference.attention(*inputs, mask, case.causal)
    dead = lse == -math.inf
    assert out.dtype == case.dtype
    assert out.shape == expected.shape
    assert not out[dead].any(), "rows without keys are not zero"
    error = reference.relative_error(out, expected)
    record(provider, f"output {name(case.dtype)}", error, exact_tolerance(provider, case.dtype))


@pytest.mark.parametrize(("provider", "case"), provider_cases(lambda can: can.backward))
def test_gradients(provider, case, record):
    inputs, mask = case.inputs(grad=True), case.make_mask()
    expected, _ = reference.attention(*inputs, mask, case.causal)
    grad = torch.randn_like(expected).to(case.dtype)
    expected_grads = torch.autograd.grad(expected, inputs, grad.double())
    grads = torch.autograd.grad(dispatch(provider, case, inputs, mask), inputs, grad)
    for which, ours, true, tensor in zip("qkv", grads, expected_grads, inputs):
        assert ours.shape == tensor.shape
        if true.norm() < 1e-3:  # softmax over one key has no gradient; what is left is rounding
            assert ours.norm() < 1e-1
            continue
        error = reference.relative_error(ours, true)
        record(provider, f"d{which} {name(case.dtype)}", error, GRAD_TOLERANCE[case.dtype])


@pytest.mark.parametrize(("provider", "case"), provider_cases(lambda can: can.backward, [NAMED["bf16"], NAMED["bshd"]]))
def test_gradients_in_any_layout(provider, case, record):
    """In memory, gradients of one shape lie in different ways: that of an output that is concatenated with others has
    gaps. PyTorch 2.11 reads all of them as cuDNN's first."""
    inputs = case.inputs(grad=True)
    expected, _ = reference.attention(*inputs)
    wide = torch.randn(2, case.query_len, 5, case.heads, case.head_dim, device="cuda", dtype=case.dtype)
    grad = wide[:, :, 2].transpose(1, 2)
    expected_grads = torch.autograd.grad(expected, inputs, grad.double())
    for laid_out in (grad.contiguous(), grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        grads = torch.autograd.grad(dispatch(provider, case, inputs, None), inputs, laid_out)
        for which, ours, true in zip("qkv", grads, expected_grads):
            error = reference.relative_error(ours, true)
            record(provider, f"d{which} {name(case.dtype)}", error, GRAD_TOLERANCE[case.dtype])


ADAPTER_CASES = [
    NAMED[each]
    for each in (
        "bf16",
        "fp16",
        "cross",
        "long",
        "gqa",
        "padding",
        "padding gqa",
        "a sequence without keys",
        "outer",
        "bias",
    )
]


def to_layout(adapter, *tensors):
    """`[B, H, S, D]` as the adapter takes it, or back."""
    return tensors if adapter.layout == "bhsd" else tuple(tensor.transpose(1, 2) for tensor in tensors)


def lower(provider, case, inputs):
    """What dispatch would do for an adapter without GQA."""
    query, key, value = inputs
    if case.heads != case.kv_heads and not SPECS[provider].capabilities.gqa:
        key, value = (tensor.repeat_interleave(case.heads // case.kv_heads, dim=1) for tensor in (key, value))
    return query, key, value


def params(kind, query, key):
    return Params(kind, False, 0.11, False, 0.0, query.shape[1] != key.shape[1], "cuda", ())


@pytest.mark.parametrize(("provider", "case"), provider_cases(lambda can: can.lse, ADAPTER_CASES))
def test_lse(provider, case, record):
    """The natural logarithm of the true sum, `[B, Lq, H]` in float32, and -inf where there is no key."""
    adapter, mask = load(provider, source_of(SPECS[provider])), case.make_mask()
    query, key, value = lower(provider, case, case.inputs())
    kind, view = classify(mask, 2, case.heads, case.query_len, case.key_len)
    _, lse = adapter.forward(*to_layout(adapter, query, key, value), view, params(kind, query, key))
    _, expected = reference.attention(query, key, value, mask, scale=0.11)
    expected = expected.transpose(1, 2)
    dead = expected == -math.inf
    assert lse.shape == expected.shape
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, dead)
    error = (lse.double() - expected).masked_fill(dead, 0.0).abs().max().item()
    limit = LSE_TOLERANCE if SPECS[provider].capabilities.exact else LOSSY_LSE_TOLERANCE
    record(provider, "lse", error, limit)


@pytest.mark.parametrize(
    ("provider", "case"), provider_cases(lambda can: can.lse and can.backward and can.backward_of_parts, ADAPTER_CASES)
)
def test_parts_of_the_keys_add_up(provider, case, record):
    """What ring attention does: each part forward, merged by lse; then each part backward from the merged result."""
    adapter, mask = load(provider, source_of(SPECS[provider])), case.make_mask()
    query, key, value = lower(provider, case, case.inputs(grad=True))
    split = case.key_len // 3
    parts = []
    for part in (slice(0, split), slice(split, case.key_len)):
        piece = mask if mask is None or mask.shape[-1] == 1 else mask[..., part]
        kind, view = classify(piece, 2, case.heads, case.query_len, part.stop - part.start)
        tensors = to_layout(adapter, query.detach(), key.detach()[:, :, part], value.detach()[:, :, part])
        parts.append((*tensors, view, params(kind, query, key)))
    partial = [adapter.forward(*part) for part in parts]
    lse = torch.logsumexp(torch.stack([lse for _, lse in partial]), dim=0)
    weights = [(each - lse).exp().nan_to_num(0.0).unsqueeze(-1) for _, each in partial]
    if adapter.layout == "bhsd":
        weights = [weight.transpose(1, 2) for weight in weights]
    out = sum(weight * out for weight, (out, _) in zip(weights, partial)).to(case.dtype)
    grad = torch.randn_like(out)
    pieces = [adapter.backward(grad, *part[:4], out, lse, part[4]) for part in parts]
    seq = 2 if adapter.layout == "bhsd" else 1
    grads = (
        pieces[0][0].float() + pieces[1][0].float(),
        torch.cat([pieces[0][1], pieces[1][1]], dim=seq),
        torch.cat([pieces[0][2], pieces[1][2]], dim=seq),
    )
    expected, _ = reference.attention(query, key, value, mask, scale=0.11)
    expected_grads = torch.autograd.grad(expected, (query, key, value), to_layout(adapter, grad)[0].double())
    for which, ours, true in zip("qkv", to_layout(adapter, *grads), expected_grads):
        error = reference.relative_error(ours, true)
        record(provider, f"partial d{which} {name(case.dtype)}", error, GRAD_TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_are_what_they_say(case):
    mask = case.make_mask()
    assert classify(mask, 2, case.heads, case.query_len, case.key_len)[0] == case.mask_kind
    assert any(serves(provider, case) for provider in SPECS)
