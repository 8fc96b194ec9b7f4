"""Key masks as sequence lengths, with a CPU kernel in place of FlashAttention's."""

import math

import pytest
import torch

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers import varlen
from diffusers_attn.providers.aten_kernels import Math
from diffusers_attn.providers.base import KernelFunction, Params
from diffusers_attn.providers.flash_family import FlashAttention

from .. import reference

B, HEADS, LQ, LK, D = 3, 2, 5, 7, 8
PARAMS = Params(MaskKind.KEY, False, 0.3, False, 0.0, False, "cpu", ())


class WrittenOut(FlashAttention):
    """A variable-length kernel to the letter: +inf without keys, unused places left as they are."""

    @classmethod
    def sequences(cls, lengths):
        places = zip(lengths.cu_query, lengths.cu_query[1:], lengths.cu_key, lengths.cu_key[1:])
        for q_start, q_end, k_start, k_end in places:
            yield slice(int(q_start), int(q_end)), slice(int(k_start), int(k_end))

    @classmethod
    def bhsd(cls, *tensors):
        return [tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors]

    @classmethod
    def run(cls, query, key, value, lengths, settings):
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
        for q, k in cls.sequences(lengths):
            part, part_lse = Math.forward(*cls.bhsd(query[q], key[k], value[k]), None, PARAMS)
            out[q], lse[:, q] = part[0].transpose(0, 1), part_lse[0].T
        return out, lse.masked_fill(lse == -math.inf, math.inf)

    @classmethod
    def run_backward(cls, grad_out, query, key, value, out, lse, lengths, settings):
        assert not (lse == -math.inf).any()
        grads = [torch.full_like(tensor, math.nan) for tensor in (query, key, value)]
        for q, k in cls.sequences(lengths):
            tensors = cls.bhsd(grad_out[q], query[q], key[k], value[k])
            parts = Math.backward(*tensors, None, *cls.bhsd(out[q]), lse[:, q].T.unsqueeze(0), PARAMS)
            for grad, part, place in zip(grads, parts, (q, k, k)):
                grad[place] = part[0].transpose(0, 1)
        return tuple(grads)


class Always(WrittenOut):
    always_varlen = True


MASKS = {
    "padding": torch.arange(LK) < torch.tensor([7, 3, 5]).view(B, 1, 1, 1),
    "holes": torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool().view(1, 1, 1, LK),
    "a sequence without keys": torch.arange(LK) < torch.tensor([4, 0, 7]).view(B, 1, 1, 1),
    "nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    "one for all keys": torch.tensor([True, False, True]).view(B, 1, 1, 1),
}


def inputs():
    query = torch.randn(B, LQ, HEADS, D, dtype=torch.float64)
    key, value = torch.randn(2, B, LK, HEADS, D, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (query, key, value)]


@pytest.mark.parametrize("name", MASKS)
def test_key_masks_become_lengths(name):
    tensors, mask = inputs(), MASKS[name]
    out, lse = KernelFunction.apply(WrittenOut, *tensors, mask, PARAMS)
    expected, expected_lse = reference.attention(*(each.transpose(1, 2) for each in tensors), mask, scale=0.3)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-12)
    assert torch.allclose(lse, expected_lse.transpose(1, 2))
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, grad)
    for ours, true in zip(found, torch.autograd.grad(expected, tensors, grad.transpose(1, 2))):
        assert torch.allclose(ours, true, atol=1e-12)


def test_the_variable_length_kernel_serves_every_call():
    tensors = inputs()
    out, lse = KernelFunction.apply(Always, *tensors, None, PARAMS)
    expected, expected_lse = reference.attention(*(each.transpose(1, 2) for each in tensors), scale=0.3)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-12)
    assert torch.allclose(lse, expected_lse.transpose(1, 2))
    grad = torch.randn_like(out)
    for ours, true in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad.transpose(1, 2))
    ):
        assert torch.allclose(ours, true, atol=1e-12)


@pytest.mark.parametrize("across_batch", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_packing_keeps_the_order_and_can_be_undone(name, across_batch):
    mask = MASKS[name]
    tensor = torch.arange(1.0, B * LK + 1).view(B, LK, 1, 1)
    keep = mask.expand(B, 1, 1, LK).reshape(B, LK)
    packing = varlen.pack_keys(mask, B, LK, across_batch=across_batch)
    packed = varlen.pack(tensor, packing).flatten()
    assert packing.lengths.tolist() == keep.sum(dim=1).tolist()
    kept = [row[which].tolist() for row, which in zip(tensor.view(B, LK), keep)]
    if across_batch:
        assert packed[: keep.sum()].tolist() == [each for row in kept for each in row]
        assert varlen.cumulative(packing.lengths).tolist() == [0, *keep.sum(dim=1).cumsum(dim=0).tolist()]
    else:
        assert [row[: len(which)].tolist() for row, which in zip(packed.view(B, LK), kept)] == kept
    undone = varlen.unpack_gradient(varlen.pack(tensor, packing), packing, tensor)
    assert torch.equal(undone, tensor * keep.view(B, LK, 1, 1))


def test_packing_is_one_graph_for_every_mask(fresh_compiler):
    graphs = []

    def count(module, example):
        graphs.append(module)
        return module.forward

    @torch.compile(backend=count, fullgraph=True)
    def packed(tensor, mask):
        packing = varlen.pack_keys(mask, B, LK, across_batch=True)
        return varlen.unpack_gradient(varlen.pack(tensor, packing), packing, tensor), varlen.cumulative(packing.lengths)

    tensor = torch.randn(B, LK, HEADS, D)
    for name in ("padding", "a sequence without keys", "padding"):
        undone, _ = packed(tensor, MASKS[name])
        assert torch.equal(undone, tensor * MASKS[name].view(B, LK, 1, 1))
    assert len(graphs) == 1
