"""Tensors whose values arrive later: what is recorded, and what makes them arrive."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_attn.guidance.pending import Arrival, PendingTensor, known

VALUE = torch.arange(12.0).view(3, 4)


@pytest.fixture
def pending():
    """A pending tensor, and the list of its exchanges."""
    exchanges = []

    def fill():
        exchanges.append(1)
        tensor.value = VALUE.clone()

    tensor = PendingTensor(VALUE.to("meta"), VALUE.device, Arrival(fill))
    return tensor, exchanges


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :2],
        lambda x: x.to(torch.float64),
        lambda x: x.float().view(4, 3).transpose(0, 1),
        lambda x: torch.stack([x, x.half().float()]).chunk(2)[1],
        lambda x: -x * 2 + 1,
    ],
)
def test_changes_of_one_output_wait(pending, change):
    tensor, exchanges = pending
    changed = change(tensor)
    expected = change(VALUE)
    if type(changed) is PendingTensor:
        assert not exchanges
    assert changed.shape == expected.shape and changed.dtype == expected.dtype
    assert torch.equal(known(changed), expected) and exchanges == [1]
    assert type(tensor + 1) is torch.Tensor and exchanges == [1]


def test_slices_and_casts_need_no_value(pending):
    tensor, exchanges = pending
    changed = tensor[:, :2].to(torch.float64).contiguous()
    assert not exchanges and isinstance(changed, PendingTensor) and repr(changed).startswith("PendingTensor([3, 2]")
    assert torch.equal(known(changed), VALUE[:, :2].double())


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + torch.ones(4),
        lambda x: x.sum().item(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: bool((x > 100).any()),
        lambda x: x + torch.rand_like(x),
        lambda x: copy.deepcopy(x),
        lambda x: x.mul_(2),
    ],
)
def test_a_value_that_is_needed_arrives(pending, use):
    tensor, exchanges = pending
    torch.manual_seed(0)
    found = use(tensor)
    assert exchanges == [1]
    torch.manual_seed(0)
    expected = use(VALUE.clone())
    assert str(found) == str(expected)


def test_what_was_recorded_has_the_value_from_before_a_change_in_place(pending):
    tensor, _ = pending
    cast, view = tensor.double(), tensor[1]
    tensor.add_(100)
    assert torch.equal(known(cast), VALUE.double()) and torch.equal(known(view), VALUE[1] + 100)


def test_a_tensor_that_changes_before_the_value_arrives(pending):
    tensor, exchanges = pending
    other = torch.ones(4)
    total = tensor + other
    other.zero_()
    assert exchanges and torch.equal(total, VALUE + 1)
