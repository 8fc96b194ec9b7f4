import importlib.util
import math
import os
import sys

import pytest
import torch

from diffusers_attn.context_parallel.attention.merge import merge

from ... import launching, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_merge_to_the_whole(dtype):
    query, key, value = (torch.randn(2, 3, length, 8).to(dtype) for length in (5, 9, 9))
    parts = [reference.attention(query, key[:, :, part], value[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    wide = torch.promote_types(dtype, torch.float32)
    parts = [(out.transpose(1, 2).to(dtype), lse.transpose(1, 2).to(wide)) for out, lse in parts]
    first, second = parts
    out, lse = merge(*first, *second, dtype=wide)
    expected_out, expected_lse = (tensor.transpose(1, 2) for tensor in reference.attention(query, key, value))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert out.dtype == lse.dtype == wide
    assert reference.relative_error(out, expected_out) < tolerance
    assert reference.relative_error(lse, expected_lse) < min(tolerance, 1e-6)
    # The last of several: only what it returns is rounded.
    rounded, same_lse = merge(*first, *second, dtype=wide, out_dtype=dtype)
    assert torch.equal(rounded, out.to(dtype)) and torch.equal(same_lse, lse)


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


INTERPRETED = """
import contextlib, math, sys
import torch
from diffusers_attn.context_parallel.attention.merge import merge_by_formula
from diffusers_attn.context_parallel.attention.merge_triton import merge_by_kernel

torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
for dtype in (torch.float32, torch.float16):
    for head_dim in (64, 72):
        out = torch.randn(2, 3, 41, head_dim).to(dtype).transpose(1, 2)
        part = torch.randn(2, 41, 3, 2 * head_dim).to(dtype)[..., ::2]
        lse, part_lse = torch.randn(2, 3, 41).mul(5).transpose(1, 2).clone(), torch.randn(2, 41, 3)
        lse[0, 3] = part_lse[0, 5] = lse[1, 7] = part_lse[1, 7] = -math.inf
        for merge_dtype in (torch.float32, dtype):
            for out_dtype in (torch.float32, dtype):
                found = merge_by_kernel(out, lse, part, part_lse, merge_dtype, out_dtype)
                expected = merge_by_formula(out, lse, part, part_lse, merge_dtype, out_dtype)
                for one, other in zip(found, expected):
                    torch.testing.assert_close(one, other, rtol=2e-3 if one.dtype == torch.float16 else 2e-6, atol=2e-6)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_by_triton_s_interpreter():
    """On a CPU, where it must be asked for before Triton is imported; `tests/gpu` has the kernel itself."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    launching.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], env=environment, check=True)
