"""The kernel that merges partial results, against the formula and against float64."""

import math

import pytest
import torch

from diffusers_attn.context_parallel.attention.merge import merge, merge_by_formula

from .. import reference

pytestmark = pytest.mark.gpu
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("narrow", [False, True])
def test_any_strides(dtype, head_dim, narrow):
    out = torch.randn(2, 5, 201, head_dim, device="cuda").to(dtype).transpose(1, 2)
    part = torch.randn(2, 201, 5, 2 * head_dim, device="cuda").to(dtype)[..., ::2]
    lse, part_lse = torch.randn(2, 5, 201, device="cuda").mul(5).transpose(1, 2), torch.randn(2, 201, 5, device="cuda")
    merge_dtype = dtype if narrow else torch.float32
    for out_dtype in {dtype, torch.float32}:
        found = merge(out, lse, part, part_lse, dtype=merge_dtype, out_dtype=out_dtype)
        expected = merge_by_formula(out, lse, part, part_lse, merge_dtype, out_dtype)
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        for ours, formula in zip(found, expected):
            # Half an ulp more, where the last rounding falls to the other side; of the terms, where they cancel.
            coarse = ours.dtype in HALF or (narrow and dtype in HALF)
            torch.testing.assert_close(ours, formula, rtol=1e-2 if coarse else 2e-6, atol=1e-2 if coarse else 2e-6)
        exact = merge_by_formula(out.double(), lse.double(), part.double(), part_lse.double(), *[torch.float64] * 2)
        limit = 5e-3 if dtype in HALF and (narrow or out_dtype == dtype) else 1e-6
        assert reference.relative_error(found[0], exact[0]) < limit
        assert reference.relative_error(found[1], exact[1]) < 1e-6


def test_rows_without_keys():
    some, nothing = torch.ones(1, 2, 1, 64, device="cuda"), torch.zeros(1, 2, 1, 64, device="cuda")
    some_lse, no_lse = torch.full((1, 2, 1), 2.0, device="cuda"), torch.full((1, 2, 1), -math.inf, device="cuda")
    for first, second in (((some, some_lse), (nothing, no_lse)), ((nothing, no_lse), (some, some_lse))):
        out, lse = merge(*first, *second)
        assert torch.equal(out, some) and torch.equal(lse, some_lse)
    out, lse = merge(nothing, no_lse, nothing, no_lse)
    assert torch.equal(out, nothing) and torch.equal(lse, no_lse)
    out, lse = merge(some, torch.full_like(some_lse, 3e38), nothing, torch.full_like(some_lse, 3e38))
    assert torch.equal(out, some / 2) and lse.isfinite().all()
    empty = torch.zeros(1, 0, 3, 64, device="cuda"), torch.zeros(1, 0, 3, device="cuda")
    assert merge(*empty, *empty)[0].shape == (1, 0, 3, 64)
