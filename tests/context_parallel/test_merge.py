import math

import pytest
import torch

from diffusers_attn.context_parallel.merge import merge

from .. import reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_merge_to_the_whole(dtype):
    query, key, value = (torch.randn(2, 3, length, 8).to(dtype) for length in (5, 9, 9))
    parts = [reference.attention(query, key[:, :, part], value[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    wide = torch.promote_types(dtype, torch.float32)
    parts = [(out.transpose(1, 2).to(dtype), lse.transpose(1, 2).to(wide)) for out, lse in parts]
    (first_out, first_lse), second = parts
    out, lse = merge(first_out.to(wide), first_lse, *second)
    expected_out, expected_lse = (tensor.transpose(1, 2) for tensor in reference.attention(query, key, value))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert out.dtype == lse.dtype == wide
    assert reference.relative_error(out, expected_out) < tolerance
    assert reference.relative_error(lse, expected_lse) < min(tolerance, 1e-6)


def test_a_part_without_keys_weighs_nothing():
    some, nothing = torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    some_lse, no_lse = torch.full((1, 2, 1), 2.0), torch.full((1, 2, 1), -math.inf)
    for first, second in (((some, some_lse), (nothing, no_lse)), ((nothing, no_lse), (some, some_lse))):
        out, lse = merge(*first, *second)
        assert torch.equal(out, some) and torch.equal(lse, some_lse)
    out, lse = merge(nothing, no_lse, nothing, no_lse)
    assert torch.equal(out, nothing) and torch.equal(lse, no_lse)


def test_large_scores_do_not_overflow():
    out, lse = merge(
        torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 3e38), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 3e38)
    )
    assert out.item() == 0.5 and math.isfinite(lse.item())
