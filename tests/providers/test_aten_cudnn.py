"""The ways around faults of cuDNN's backward, on a CPU. The kernel itself is in tests/gpu."""

import math

import pytest
import torch

from diffusers_attn.providers.aten_cudnn import NO_DROPOUT, needs_full_block, with_full_block

from .. import reference


def test_a_dropout_of_zero_has_a_sign():
    """PyTorch compares the bytes of a backward's parameters: no other caller passes these."""
    assert NO_DROPOUT == 0.0 and math.copysign(1.0, NO_DROPOUT) == -1.0


@pytest.mark.parametrize("kind", ["none", "key", "one value for all keys", "rows", "additive"])
def test_keys_of_a_full_block_take_no_part(kind):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 64, 3, 8, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    mask = {
        "none": None,
        "key": torch.arange(64).view(1, 1, 1, 64) < torch.tensor([64, 7]).view(2, 1, 1, 1),
        "one value for all keys": torch.tensor([True, False]).view(2, 1, 1, 1),
        "rows": torch.rand(2, 1, 5, 64) > 0.5,
        "additive": torch.randn(1, 3, 5, 64),
    }[kind]
    more = with_full_block(key, value, mask)
    assert [each.shape[-2] for each in more[:2]] == [128, 128] and more[2].shape[-1] == 128
    assert more[0].transpose(1, 2).is_contiguous()  # as the key was laid out
    if mask is not None:  # stored once for all queries, heads and samples, as before
        assert more[2].shape[:3] == mask.shape[:3]
    expected, lse = reference.attention(query, key, value, mask)
    found, more_lse = reference.attention(query, *more)
    assert torch.allclose(found, expected, atol=1e-12) and torch.allclose(more_lse, lse, atol=1e-12)


@pytest.mark.parametrize("key_len", [64, 192, 320])
def test_half_blocks_are_filled(key_len):
    assert needs_full_block(333, key_len)


@pytest.mark.parametrize("lengths", [(333, 128), (333, 63), (333, 333), (333, 1), (1, 333)])
def test_other_blocks_stay(lengths):
    assert not needs_full_block(*lengths)


def test_one_query_with_one_key_gets_more_keys():
    assert needs_full_block(1, 1)
