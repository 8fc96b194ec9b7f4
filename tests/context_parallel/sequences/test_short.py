"""Sequences of which some rank would have nothing: refused on all ranks alike, before any of them runs the model's code
without a token; or served, where the plan says how."""

import pytest
import torch

from diffusers_attn import AttentionProviderError, CPInput
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel

from ..hooks.test_plan_words import mesh_of, tracker_of
from ..models import MESHES, compare


class Gives(torch.nn.Module):
    def forward(self, tokens):
        return tokens


def test_all_ranks_refuse_what_one_would_have_nothing_of():
    messages = set()
    for rank in range(3):
        model = Gives()
        apply_context_parallel(model, mesh_of(rank), {"": {"tokens": CPInput(1)}})
        with pytest.raises(AttentionProviderError) as caught:
            model(torch.ones(2, 2, 32))
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith("a tensor [2, 2, 32] is to be split along dimension 1 over 3 ranks, and ':tokens' has a")


def test_of_a_sequence_with_a_name_a_token_stands_in():
    for rank in range(3):
        model = Gives()
        apply_context_parallel(model, mesh_of(rank), {"": {"tokens": CPInput(1, sequence="text")}})
        assert model(torch.tensor([[1, 2]])).tolist() == [[[1], [2], [1]][rank]]


@pytest.mark.parametrize("length", [1, 2])
def test_of_joined_sequences_none_may_be_too_short(length):
    for rank in range(3):
        tracker = tracker_of(rank)
        tracker.split("image", torch.zeros(7), 0)
        with pytest.raises(AttentionProviderError, match=f"'text' has a length of {length} there"):
            tracker.split(("text", "image"), torch.zeros(7 + length), 0)


def test_none_of_a_sequence_is_a_part_of_it():
    for rank in range(3):
        assert tracker_of(rank).split("text", torch.zeros(2, 0), 1).shape == (2, 0)


def test_one_row_of_rotary_values_is_for_all_tokens(pool):
    ring, ulysses, method = MESHES["ulysses 2"]
    where = {"ring": ring, "ulysses": ulysses, "rotate_method": method}
    for errors in pool.run(2, compare, name="hunyuan_dit, one angle for all tokens", plan=None, **where):
        assert max(errors) < 1e-10
