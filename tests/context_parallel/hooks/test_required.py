"""Arguments that a plan requires, because the model works differently without them."""

import pytest
import torch
from torch import nn

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.cp_plans import advanced

from ..models import build, inputs
from .test_plan_words import mesh_of


class Recorder(nn.Module):
    def forward(self, hidden_states, text=None, **kwargs):
        return text


@pytest.mark.parametrize("name", ["text", "of_kwargs"])
def test_a_forward_without_it_is_refused_first(name):
    module = Recorder()
    apply_context_parallel(
        module, mesh_of(0), {"": {name: advanced.CPRequired("it attends to itself. Give it a text.")}}
    )
    module.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    for given in ({}, {name: None}):
        with pytest.raises(AttentionProviderError, match=f"no {name}, .* it attends to itself. Give it a text"):
            module(torch.zeros(1, 6), **given)


def test_with_it_nothing_is_changed():
    module = Recorder()
    apply_context_parallel(module, mesh_of(0), {"": {"text": advanced.CPRequired("...")}})
    text = torch.zeros(1, 5)
    assert module(torch.zeros(1, 6), text) is text and module(torch.zeros(1, 6), text=text) is text


@pytest.mark.parametrize("name", ["transformer_2d", "dreamlite_2d"])
def test_cross_attention_without_a_text_is_refused(name):
    """It would attend to the image, of which a rank has a part."""
    model, given = build(name), inputs(name)
    apply_context_parallel(model, mesh_of(0))
    del given["encoder_hidden_states"]
    with pytest.raises(AttentionProviderError, match="no encoder_hidden_states.*Give it a text"):
        model(**given)


def test_two_self_attentions_with_a_text_are_refused():
    model = build("transformer_2d, two self-attentions")
    apply_context_parallel(model, mesh_of(0))
    with pytest.raises(AttentionProviderError, match="Leave it out"):
        model(**inputs("transformer_2d"))
