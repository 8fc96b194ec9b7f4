"""Where received values are kept: as long as the input that they replace, and at the same address."""

import copy
import pickle

import pytest
import torch

from diffusers_attn.parallelize.received import ReceivedInputs


def test_the_same_input_is_received_in_the_same_memory():
    received = ReceivedInputs()
    prompt, other = torch.zeros(2, 3), torch.zeros(2, 3)
    first = received.keep(prompt, torch.ones(2, 3))
    assert received.keep(other, torch.ones(2, 3)).data_ptr() != first.data_ptr()
    again = received.keep(prompt[:], torch.full((2, 3), 2.0))  # a view that is made anew for every call
    assert again.data_ptr() == first.data_ptr() and again.tolist() == [[2.0] * 3] * 2
    assert received.keep(prompt[:1], torch.ones(1, 3)).data_ptr() != first.data_ptr()
    assert prompt.tolist() == [[0.0] * 3] * 2  # nobody writes into what the user has


def test_it_is_freed_with_its_input():
    received = ReceivedInputs()
    prompt = torch.zeros(4)
    received.keep(prompt, torch.ones(4))
    received.forget()
    assert len(received._entries) == 1
    del prompt
    received.forget()
    assert len(received._entries) == 0


def test_strides_are_those_of_the_input():
    one = torch.zeros(3, 2).t()
    found = ReceivedInputs().keep(one, torch.arange(6.0).view(2, 3))
    assert found.stride() == one.stride() and found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert ReceivedInputs().keep(torch.zeros(1).expand(3), torch.arange(3.0)).tolist() == [0, 1, 2]


def test_two_forwards_before_one_backward():
    received, weight = ReceivedInputs(), torch.ones(3, requires_grad=True)
    prompt = torch.zeros(3)
    loss = (received.keep(prompt, torch.full((3,), 2.0)) * weight).sum()
    loss = loss + (received.keep(prompt, torch.full((3,), 2.0)) * weight).sum()
    assert torch.autograd.grad(loss, weight)[0].tolist() == [4.0] * 3
    loss = (received.keep(prompt, torch.full((3,), 2.0)) * weight).sum()
    prompt += 1  # as on one process, what was saved for the gradient is then not there any more
    received.keep(prompt, torch.full((3,), 3.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_back():
    received = ReceivedInputs()
    prompt = torch.zeros(3)
    for _ in range(2):
        with torch.inference_mode():
            assert received.keep(prompt, torch.ones(3)).tolist() == [1.0] * 3
        assert received.keep(prompt, torch.ones(3)).tolist() == [1.0] * 3


def test_a_copy_starts_empty():
    """A StorageWeakRef that is copied frees its reference twice, which ends the process."""
    received = ReceivedInputs()
    own = torch.zeros(3)
    received.keep(own, torch.arange(3.0))
    copied = copy.deepcopy(received)
    assert copied._entries == {} and pickle.loads(pickle.dumps(received))._entries == {}
    assert copied.keep(own, torch.ones(3)).tolist() == [1, 1, 1]
