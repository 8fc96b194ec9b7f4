"""The contract of adapters: the lse, and a backward from the lse of more keys. (GPU adapters: tests/gpu.)"""

import math

import pytest
import torch

from diffusers_attn.masks import MaskKind, classify
from diffusers_attn.providers.base import Adapter, KernelFunction, Params
from diffusers_attn.providers.catalog import SPECS
from diffusers_attn.providers.registry import load

from .. import reference

B, HEADS, LQ, LK, D = 2, 4, 7, 9, 16
FORWARD = [name for name, spec in SPECS.items() if "cpu" in spec.capabilities.devices and spec.capabilities.lse]
BACKWARD = [name for name in FORWARD if "cpu" not in SPECS[name].capabilities.without_backward_on]
MASKS = {
    "none": None,
    "key": torch.arange(LK) < torch.tensor([6, 9]).view(B, 1, 1, 1),
    "no key": (torch.arange(LK) < torch.tensor([0, 9]).view(B, 1, 1, 1)),
    "outer": (torch.arange(LQ) < 5).view(LQ, 1) & (torch.arange(LK) < 4),
    "bias": torch.linspace(-2, 2, HEADS * LQ * LK).view(1, HEADS, LQ, LK),
}


def make(dtype, kv_heads=HEADS, key_len=LK):
    query = torch.randn(B, HEADS, LQ, D).to(dtype)
    key, value = torch.randn(2, B, kv_heads, key_len, D).to(dtype)
    return query, key, value


def params(kind, gqa=False, causal=False, scale=0.2):
    return Params(kind, causal, scale, False, 0.0, gqa, "cpu", ())


def adapter_of(provider):
    """A provider's adapter, for tensors with heads before lengths whichever it takes."""
    adapter = load(provider)
    if adapter.layout == "bhsd":
        return adapter

    def swapped(*tensors):
        return tuple(tensor.transpose(1, 2) for tensor in tensors)

    class ByHeads(Adapter):
        layout = "bhsd"

        @staticmethod
        def forward(query, key, value, mask, params):
            out, lse = adapter.forward(*swapped(query, key, value), mask, params)
            return out.transpose(1, 2), lse

        @staticmethod
        def backward(grad_out, query, key, value, mask, out, lse, params):
            given = swapped(grad_out, query, key, value)
            return swapped(*adapter.backward(*given, mask, out.transpose(1, 2), lse, params))

    return ByHeads


def masks_of(provider):
    """Those of `MASKS` that a provider takes; dispatch lowers or refuses the others."""
    return [name for name in MASKS if classify(MASKS[name], B, HEADS, LQ, LK)[0] in SPECS[provider].capabilities.masks]


def test_the_providers_that_are_here_take_every_mask():
    assert all(masks_of(name) == list(MASKS) for name in ("native", "_native_math", "flex"))


# Dispatch merges causality into a mask before an adapter sees it, so that the two do not meet here.
@pytest.mark.parametrize(
    ("provider", "dtype", "mask", "causal"),
    [
        (name, dtype, mask, causal)
        for name in FORWARD
        for dtype in sorted(SPECS[name].capabilities.dtypes, key=str)
        for mask, causal in [(mask, False) for mask in masks_of(name)] + [("none", True)]
        if not causal or SPECS[name].capabilities.causal == "top_left"
    ],
)
def test_lse_is_the_natural_logarithm_of_the_true_sum(provider, dtype, mask, causal):
    query, key, value = make(dtype)
    kind, view = classify(MASKS[mask], B, HEADS, LQ, LK)
    out, lse = adapter_of(provider).forward(query, key, value, view, params(kind, causal=causal))
    expected_out, expected_lse = reference.attention(query, key, value, MASKS[mask], causal, scale=0.2)
    assert lse.shape == (B, LQ, HEADS)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected_lse = expected_lse.transpose(1, 2)
    dead = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, dead)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert (lse.double() - expected_lse).masked_fill(dead, 0.0).abs().max() < tolerance
    assert reference.relative_error(out, expected_out) < tolerance
    assert not out.transpose(1, 2)[dead].any()


@pytest.mark.parametrize("provider", BACKWARD)
def test_head_dim_need_not_be_innermost(provider):
    """Of any tensor, in either function."""
    query, key, value = make(torch.float64)
    grad_out = torch.randn(B, HEADS, LQ, D, dtype=torch.float64)
    expected = [each.requires_grad_() for each in (query, key, value)]
    expected_out, _ = reference.attention(*expected, scale=0.2)
    query, key, value, grad_out = (each.detach().mT.contiguous().mT for each in (query, key, value, grad_out))
    constants = params(MaskKind.NONE)
    out, lse = adapter_of(provider).forward(query, key, value, None, constants)
    assert torch.allclose(out, expected_out, atol=1e-12)
    grads = adapter_of(provider).backward(grad_out, query, key, value, None, out.mT.contiguous().mT, lse, constants)
    for ours, theirs in zip(grads, torch.autograd.grad(expected_out, expected, grad_out)):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize(
    ("provider", "kv_heads", "mask"),
    [
        (name, heads, mask)
        for name in BACKWARD
        for heads in (HEADS, 2)
        for mask in masks_of(name)
        if heads == HEADS or SPECS[name].capabilities.gqa
    ],
)
def test_parts_of_the_keys_add_up(provider, mask, kv_heads):
    """Forward over two parts of the keys, merged by their lse; backward of each part from the merged result."""
    adapter = adapter_of(provider)
    query, key, value = make(torch.float64, kv_heads)
    grad_out = torch.randn(B, HEADS, LQ, D, dtype=torch.float64)
    parts = []
    for part in (slice(0, 4), slice(4, LK)):
        piece = MASKS[mask][..., part] if MASKS[mask] is not None else None
        kind, view = classify(piece, B, HEADS, LQ, part.stop - part.start)
        parts.append((key[:, :, part], value[:, :, part], view, params(kind, gqa=kv_heads != HEADS)))
    partial = [adapter.forward(query, *part) for part in parts]
    lse = torch.logsumexp(torch.stack([lse for _, lse in partial]), dim=0)
    weights = [(each - lse).exp().nan_to_num(0.0).transpose(1, 2).unsqueeze(-1) for _, each in partial]
    out = sum(weight * out for weight, (out, _) in zip(weights, partial))
    grads = [
        adapter.backward(grad_out, query, part_key, part_value, view, out, lse, each)
        for part_key, part_value, view, each in parts
    ]
    found = (
        grads[0][0] + grads[1][0],
        torch.cat([grads[0][1], grads[1][1]], dim=2),
        torch.cat([grads[0][2], grads[1][2]], dim=2),
    )
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected_out, _ = reference.attention(*inputs, MASKS[mask], scale=0.2)
    assert torch.allclose(out, expected_out, atol=1e-12)
    for ours, expected in zip(found, torch.autograd.grad(expected_out, inputs, grad_out)):
        assert torch.allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize(("provider", "mask"), [(name, mask) for name in BACKWARD for mask in masks_of(name)])
def test_any_adapter_is_differentiable_through_its_two_functions(provider, mask):
    query, key, value = (tensor.requires_grad_() for tensor in make(torch.float64))
    kind, view = classify(MASKS[mask], B, HEADS, LQ, LK)

    def attention(*tensors):
        return KernelFunction.apply(adapter_of(provider), *tensors, view, params(kind))[0]

    assert torch.autograd.gradcheck(attention, (query, key, value))


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_what_native_does_around_gpu_kernels_changes_no_number(mask):
    """Those give anything in a row without keys, so native keeps such rows from them. Here with the CPU's kernels."""
    query, key, value = (tensor.requires_grad_() for tensor in make(torch.float64))
    kind, view = classify(MASKS[mask], B, HEADS, LQ, LK)
    view = view if view.dtype == torch.bool else view.double()
    constants = params(kind)._replace(device_type="cuda")
    out = load("native").bind(constants)(query, key, value, view)
    expected, _ = reference.attention(query, key, value, MASKS[mask], scale=0.2)
    assert torch.allclose(out, expected, atol=1e-12)
    grads = (torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (out, expected))
    for ours, theirs in zip(*grads):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_kinds_cover_the_masks_used_here():
    kinds = {classify(mask, B, HEADS, LQ, LK)[0] for mask in MASKS.values()}
    assert kinds == {MaskKind.NONE, MaskKind.KEY, MaskKind.DENSE, MaskKind.BIAS}
