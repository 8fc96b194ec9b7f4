"""Masks are classified by shape, dtype and strides, never by their values."""

import math

import pytest
import torch

from diffusers_attn import AttentionProviderError, masks
from diffusers_attn.masks import MaskKind

B, H, LQ, LK = 2, 3, 5, 7


def classify(mask):
    return masks.classify(mask, B, H, LQ, LK)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((LK,), MaskKind.KEY),
        ((1, LK), MaskKind.KEY),
        ((B, 1, 1, LK), MaskKind.KEY),
        ((1, 1, 1, LK), MaskKind.KEY),
        ((B, 1, 1, 1), MaskKind.KEY),
        ((LQ, LK), MaskKind.DENSE),
        ((LQ, 1), MaskKind.DENSE),
        ((H, LQ, LK), MaskKind.DENSE),
        ((H, 1, LK), MaskKind.DENSE),
        ((B, H, 1, LK), MaskKind.DENSE),
        ((B, 1, LQ, LK), MaskKind.DENSE),
        ((B, H, LQ, LK), MaskKind.DENSE),
    ],
)
def test_kind_follows_from_the_shape(shape, kind):
    mask = torch.rand(shape) > 0.5
    found, view = classify(mask)
    assert found is kind
    assert view.ndim == 4
    assert torch.equal(view.expand(B, H, LQ, LK), mask.expand(B, H, LQ, LK))
    additive = {MaskKind.KEY: MaskKind.KEY_BIAS, MaskKind.DENSE: MaskKind.BIAS}
    assert classify(torch.randn(shape))[0] is additive[kind]


def test_a_key_mask_expanded_over_heads_and_queries_is_still_a_key_mask():
    mask = (torch.rand(B, 1, 1, LK) > 0.5).expand(B, H, LQ, LK)
    kind, view = classify(mask)
    assert kind is MaskKind.KEY
    assert view.shape == (B, 1, 1, LK)


def test_nothing_is_copied():
    mask = torch.rand(B, 1, LQ, LK) > 0.5
    assert classify(mask)[1].data_ptr() == mask.data_ptr()


@pytest.mark.parametrize("shape", [(B, LK), (LK + 1,), (H + 1, LQ, LK), (1, B, H, LQ, LK), ()])
def test_a_shape_that_does_not_broadcast_is_an_error_that_names_it(shape):
    with pytest.raises(AttentionProviderError, match="does not broadcast"):
        classify(torch.ones(shape, dtype=torch.bool))


def test_an_integer_mask_is_an_error_that_says_what_to_pass():
    with pytest.raises(AttentionProviderError, match=r"mask\.bool\(\)"):
        classify(torch.ones(LK, dtype=torch.int64))


def test_something_else_is_an_error():
    with pytest.raises(AttentionProviderError, match="list"):
        classify([True])


def test_dead_rows_and_the_bias_that_leaves_none():
    mask = torch.ones(B, 1, LQ, LK, dtype=torch.bool)
    mask[0, 0, 2] = False
    mask[1, 0, :, 3:] = False
    dead = masks.dead_rows(mask)
    assert dead.nonzero().tolist() == [[0, 0, 2, 0]]
    bias = masks.as_bias(mask, dead, torch.float32)
    assert not masks.dead_rows(bias).any()
    assert torch.equal(bias == 0.0, mask | dead)
    additive = torch.zeros(B, 1, LQ, LK).masked_fill(~mask, -math.inf)
    assert torch.equal(masks.dead_rows(additive), dead)
    assert torch.equal(masks.as_bias(additive, dead, torch.float32), bias)


@pytest.mark.parametrize("additive", [False, True])
def test_causal_joins_a_mask(additive):
    mask = torch.rand(1, 1, 1, LK) > 0.3
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    joined = masks.and_causal(given, LQ, LK)
    seen = joined if not additive else joined == 0.0
    assert torch.equal(seen[0, 0], mask[0, 0] & torch.ones(LQ, LK, dtype=torch.bool).tril())
