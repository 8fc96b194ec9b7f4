"""Training where kernels failed: at the size of a real model, with gradients laid out as its blocks do, and with scores
far below zero."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from diffusers_attn import attention_dispatch, attention_provider

from .. import launching, reference
from ..documents import ROOT
from .cases import GRAD_TOLERANCE, build_lacks, providers
from .flux_attention import HEAD_DIM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("before", [(), ("after_torch",)], ids=["alone", "after PyTorch's own"])
@pytest.mark.parametrize("provider", ["auto", *providers(lambda can: can.backward and torch.bfloat16 in can.dtypes)])
def test_attention_of_flux(provider, before, record):
    if build_lacks(provider, HEAD_DIM):
        pytest.skip(f"{provider}: this flash-attn was built without head_dim {HEAD_DIM} (DIFFUSERS_ATTN_FLASH_LACKS)")
    done = launching.run(
        [sys.executable, "-m", "tests.gpu.flux_attention", provider, *before],
        cwd=ROOT,
        env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
    )
    assert done.returncode == 0, f"{provider}: {done.stderr[-2000:]}"
    for name, error in json.loads(done.stdout.splitlines()[-1]).items():
        record(provider, f"{name.split()[-1]} of Flux", error, GRAD_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("mask", ["none", "key", "additive", "causal"])
@pytest.mark.parametrize("key_len", [64, 192, 320])
@pytest.mark.parametrize("provider", ["auto", "native", "_native_cudnn"])
def test_scores_far_below_zero(provider, key_len, mask, record):
    """cuDNN's backward gave NaN with half a block of keys (`needs_full_block`)."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, key_len, 64, device="cuda") * 0.1 for _ in range(3))
    query[..., 0], key[..., 0] = 40.0, -40.0  # scores of -200
    given = {
        "none": None,
        "causal": None,
        "key": (torch.arange(key_len, device="cuda") < key_len - 5).view(1, 1, 1, key_len),
        "additive": torch.randn(2, 1, key_len, key_len, device="cuda", dtype=torch.bfloat16),
    }[mask]
    inputs = [each.bfloat16().requires_grad_() for each in (query, key, value)]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    grad_out = torch.randn(2, 4, key_len, 64, device="cuda", dtype=torch.bfloat16)
    with attention_provider(provider):
        out = attention_dispatch(*inputs, attn_mask=given, is_causal=mask == "causal")
    expected, _ = reference.attention(*wide, given, is_causal=mask == "causal")
    found = torch.autograd.grad(out, inputs, grad_out)
    wanted = torch.autograd.grad(expected, wide, grad_out.double())
    # Rounding alone moves the first feature of a query's gradient: a sum of weights, which is zero, times 40.
    for name, ours, true in zip(("dq", "dk", "dv"), found, wanted):
        first = 1 if name == "dq" else 0
        error = reference.relative_error(ours[..., first:], true[..., first:])
        record(provider, f"{name} of scores far below zero", error, 3 * GRAD_TOLERANCE[torch.bfloat16])
