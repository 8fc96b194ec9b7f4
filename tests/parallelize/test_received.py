"""Where received values are kept: as long as the input that they replace, and at the same address."""

import copy
import pickle

import pytest
import torch

from diffusers_attn.parallelize.received import ReceivedInputs


def keep(received, own, values):
    (kept,) = received.keep([own], [values])
    return kept


def test_the_same_input_is_received_in_the_same_memory():
    received = ReceivedInputs()
    prompt, other = torch.zeros(2, 3), torch.zeros(2, 3)
    first = keep(received, prompt, torch.ones(2, 3))
    assert keep(received, other, torch.ones(2, 3)).data_ptr() != first.data_ptr()
    again = keep(received, prompt[:], torch.full((2, 3), 2.0))  # a view that is made anew for every call
    assert again.data_ptr() == first.data_ptr() and again.tolist() == [[2.0] * 3] * 2
    assert keep(received, prompt[:1], torch.ones(1, 3)).data_ptr() != first.data_ptr()
    assert prompt.tolist() == [[0.0] * 3] * 2  # nobody writes into what the user has


def test_all_inputs_are_copied_by_one_operator_for_each_dtype():
    """What is this rank's own stays so, and an input that is given twice is received once."""
    given = [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(4), torch.zeros(1)]
    given.append(given[0])
    sent = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(4), given[3], torch.ones(2)]
    with torch.profiler.profile() as profile:
        kept = ReceivedInputs().keep(given, sent)
    assert [event.count for event in profile.key_averages() if event.key == "aten::_foreach_copy_"] == [2]
    assert all(torch.equal(one, other) for one, other in zip(kept, sent))
    assert kept[3] is given[3] and kept[4] is kept[0] and kept[0] is not sent[0]


def test_it_is_freed_with_its_input():
    received = ReceivedInputs()
    prompt = torch.zeros(4)
    keep(received, prompt, torch.ones(4))
    received.forget()
    assert len(received._entries) == 1
    del prompt
    received.forget()
    assert len(received._entries) == 0


def test_strides_are_those_of_the_input():
    one = torch.zeros(3, 2).t()
    found = keep(ReceivedInputs(), one, torch.arange(6.0).view(2, 3))
    assert found.stride() == one.stride() and found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert keep(ReceivedInputs(), torch.zeros(1).expand(3), torch.arange(3.0)).tolist() == [0, 1, 2]


def test_two_forwards_before_one_backward():
    received, weight = ReceivedInputs(), torch.ones(3, requires_grad=True)
    prompt = torch.zeros(3)
    loss = (keep(received, prompt, torch.full((3,), 2.0)) * weight).sum()
    loss = loss + (keep(received, prompt, torch.full((3,), 2.0)) * weight).sum()
    assert torch.autograd.grad(loss, weight)[0].tolist() == [4.0] * 3
    loss = (keep(received, prompt, torch.full((3,), 2.0)) * weight).sum()
    prompt += 1  # as on one process, what was saved for the gradient is then not there any more
    keep(received, prompt, torch.full((3,), 3.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_back():
    received = ReceivedInputs()
    prompt = torch.zeros(3)
    for _ in range(2):
        with torch.inference_mode():
            assert keep(received, prompt, torch.ones(3)).tolist() == [1.0] * 3
        assert keep(received, prompt, torch.ones(3)).tolist() == [1.0] * 3


def test_a_copy_starts_empty():
    """A StorageWeakRef that is copied frees its reference twice, which ends the process."""
    received = ReceivedInputs()
    own = torch.zeros(3)
    keep(received, own, torch.arange(3.0))
    copied = copy.deepcopy(received)
    assert copied._entries == {} and pickle.loads(pickle.dumps(received))._entries == {}
    assert keep(copied, own, torch.ones(3)).tolist() == [1, 1, 1]
