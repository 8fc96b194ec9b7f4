"""The arguments of a call: constants, which a graph depends on, and tensors, which are copied into it."""

from collections import namedtuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from diffusers_attn import AttentionProviderError
from diffusers_attn.nested import mapped
from diffusers_attn.runtime.cuda_graphs.arguments import GraphCall

Pair = namedtuple("Pair", "left right")


def call(**changes):
    arguments = {
        "hidden_states": torch.zeros(2, 3),
        "timestep": torch.zeros(2),
        "ids": [torch.zeros(1), (torch.zeros(2), None)],
        "pair": Pair(torch.zeros(4), 5),
        "attention_kwargs": {"scale": 0.5, "mask": torch.zeros(3, dtype=torch.bool)},
        "return_dict": False,
    }
    return GraphCall((torch.zeros(1), 7), arguments | changes)


def described(**changes):
    return call(**changes).taken_apart("Model")[0]


def test_calls_of_a_kind():
    assert described() == described(hidden_states=torch.ones(2, 3), timestep=torch.ones(2))
    assert hash(described()) == hash(described(hidden_states=torch.ones(2, 3)))
    others = [
        described(hidden_states=torch.zeros(3, 2)),
        described(hidden_states=torch.zeros(2, 3, dtype=torch.float64)),
        described(hidden_states=torch.zeros(3, 2).T),
        described(hidden_states=None),
        described(ids=[torch.zeros(1), [torch.zeros(2), None]]),
        described(pair=Pair(torch.zeros(4), 6)),
        described(attention_kwargs={"scale": 1.0, "mask": torch.zeros(3, dtype=torch.bool)}),
        described(return_dict=True),
        described(return_dict=0),
        described(guidance=None),
    ]
    assert len({described(), *others}) == 1 + len(others)


def test_tensors_go_back_to_their_places():
    given = call()
    _, tensors = given.taken_apart("Model")
    assert len(tensors) == 7
    found = given.with_tensors([torch.full_like(tensor, index) for index, tensor in enumerate(tensors)])
    _, again = found.taken_apart("Model")
    for index, (tensor, before) in enumerate(zip(again, tensors)):
        assert tensor.shape == before.shape and (tensor == index).all()
    assert type(found.kwargs["pair"]) is Pair and found.kwargs["pair"].right == 5
    assert type(found.kwargs["ids"][1]) is tuple and found.args[1] == 7
    assert found.kwargs["return_dict"] is False


def test_an_output_keeps_its_kind():
    output = Transformer2DModelOutput(sample=torch.zeros(2))
    found = mapped(output, lambda tensor: tensor + 1)
    assert type(found) is Transformer2DModelOutput and found.sample.tolist() == [1, 1]
    assert mapped((torch.zeros(2),), torch.ones_like)[0].tolist() == [1, 1]


def test_what_a_graph_cannot_be_given():
    with pytest.raises(AttentionProviderError, match=r"cache\['keys'\] of this call of Model is a object"):
        described(cache={"keys": object()})
