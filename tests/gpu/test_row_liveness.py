"""Masks that were found to have a key in every row are checked again when they change."""

import gc

import pytest
import torch

from diffusers_attn import attention_dispatch, attention_provider
from diffusers_attn.providers.row_liveness import _owners, known_live

from .. import reference

pytestmark = pytest.mark.gpu
PROVIDERS = ["native", "_native_cudnn", "_native_efficient"]


def inputs():
    return tuple(torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))


def padding(*lengths):
    return (torch.arange(64, device="cuda") < torch.tensor(lengths, device="cuda")[:, None])[:, None, None]


def learn(mask):
    known = []
    for _ in range(4):
        known.append(known_live(mask))
        torch.cuda.synchronize()
    return known


def test_it_is_known_after_the_second_time():
    assert learn(padding(64, 3)) == [False, False, True, True]


def test_views_of_one_tensor_are_told_apart_and_found_again():
    both = torch.stack([padding(64, 3), padding(64, 0)])
    for _ in range(2):
        assert known_live(both[0]) is known_live(both[1]) is False
        torch.cuda.synchronize()
    assert known_live(both[0]) is True
    assert known_live(both[1]) is False


def test_a_change_in_place_is_noticed():
    mask = padding(64, 3)
    learn(mask)
    mask[1] = False
    assert learn(mask) == [False] * 4
    base = padding(64, 3).flatten(1)
    learn(base[:, None, None])
    base[1] = False
    assert learn(base[:, None, None]) == [False] * 4


def test_nothing_is_kept_of_a_mask_that_is_gone():
    gc.collect()
    before = len(_owners)
    masks = [padding(64, 3 + index) for index in range(4)]
    for mask in masks:
        learn(mask)
    assert len(_owners) >= before + 4 - 1  # the last one's place may have been another's
    del masks, mask
    gc.collect()
    assert len(_owners) <= before


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("lengths", [(64, 3), (64, 0)])
def test_outputs_and_gradients_do_not_change_when_it_is_known(provider, lengths):
    mask = padding(*lengths)
    given = tuple(tensor.requires_grad_() for tensor in inputs())
    expected, _ = reference.attention(*(tensor.detach() for tensor in given), mask)
    with attention_provider(provider):
        outs = []
        for _ in range(4):
            out = attention_dispatch(*given, mask)
            grads = torch.autograd.grad(out.square().sum(), given)
            torch.cuda.synchronize()
            assert reference.relative_error(out, expected) < 5e-3
            assert all(grad.isfinite().all() for grad in grads)
            outs.append((out, *grads))
    for later in outs[1:]:
        for first, second in zip(outs[0], later):
            torch.testing.assert_close(first, second, rtol=0, atol=2e-2)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_captured_graph_takes_nothing_for_known(provider):
    given, mask = inputs(), padding(64, 3)
    with attention_provider(provider), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                attention_dispatch(*given, mask)
                torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(side)
        assert known_live(mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention_dispatch(*given, mask)
    mask[1] = False
    graph.replay()
    assert not out[1].any()
    assert reference.relative_error(out, reference.attention(*given, mask)[0]) < 5e-3


def test_a_transform_over_masks_is_told_nothing():
    masks = torch.stack([padding(64, 3), padding(64, 0)])
    seen = []

    def look(mask):
        seen.extend(known_live(mask) for _ in range(4))
        return mask

    torch.func.vmap(look)(masks)
    assert seen == [False] * 4
