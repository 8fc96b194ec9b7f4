"""The bias of kernels that know no bool masks: aligned, finite in every row, and no larger than the mask."""

import math

import pytest
import torch

from diffusers_attn.providers.bias import ALIGNMENT, aligned_bias


@pytest.mark.parametrize("key_len", [16, 33, 4608])
@pytest.mark.parametrize("additive", [False, True])
def test_a_key_mask_is_never_spread_over_heads_and_queries(key_len, additive):
    mask = torch.arange(key_len) < torch.tensor([key_len // 2, 0]).view(2, 1, 1, 1)
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    bias, dead = aligned_bias(given, torch.bfloat16, key_len)
    assert dead.flatten().tolist() == [False, True]
    assert torch.equal(bias[0] == 0.0, mask[0]) and not bias[1].any()
    spread = bias.expand(2, 24, 4608, key_len)
    assert spread.stride()[1:3] == (0, 0) and spread.stride(-1) == 1
    assert spread.stride(0) % ALIGNMENT == 0 and spread.data_ptr() % 16 == 0
    assert spread.untyped_storage().nbytes() <= 2 * 2 * (key_len + ALIGNMENT)


def test_rows_start_aligned():
    mask = torch.rand(1, 3, 7, 33) > 0.3
    bias, dead = aligned_bias(mask, torch.float32, 33)
    assert bias.shape == mask.shape and all(stride % ALIGNMENT == 0 for stride in bias.stride()[1:3])
    assert torch.equal((bias == 0.0) & ~dead, mask & ~dead)
