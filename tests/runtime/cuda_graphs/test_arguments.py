"""Taking a call apart: what must be equal for a graph to serve it, and what is given to it anew."""

from collections import namedtuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from diffusers_attn import AttentionProviderError
from diffusers_attn.runtime.cuda_graphs.arguments import GraphCall, replaced, tensors_of

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


def said(**changes):
    return call(**changes).taken_apart("Model")[0]


def test_calls_of_a_kind():
    assert said() == said(hidden_states=torch.ones(2, 3), timestep=torch.ones(2))
    assert hash(said()) == hash(said(hidden_states=torch.ones(2, 3)))
    others = [
        said(hidden_states=torch.zeros(3, 2)),
        said(hidden_states=torch.zeros(2, 3, dtype=torch.float64)),
        said(hidden_states=torch.zeros(3, 2).T),
        said(hidden_states=None),
        said(ids=[torch.zeros(1), [torch.zeros(2), None]]),
        said(pair=Pair(torch.zeros(4), 6)),
        said(attention_kwargs={"scale": 1.0, "mask": torch.zeros(3, dtype=torch.bool)}),
        said(return_dict=True),
        said(return_dict=0),
        said(guidance=None),
    ]
    assert len({said(), *others}) == 1 + len(others)


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
    found = replaced(output, iter([tensor + 1 for tensor in tensors_of(output)]))
    assert type(found) is Transformer2DModelOutput and found.sample.tolist() == [1, 1]
    (found,) = replaced((torch.zeros(2),), iter([torch.ones(2)]))
    assert found.tolist() == [1, 1]


def test_what_a_graph_cannot_be_given():
    with pytest.raises(AttentionProviderError, match=r"cache\['keys'\] of this call of Model is a object"):
        said(cache={"keys": object()})
