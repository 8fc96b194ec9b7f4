"""Sequences of which some rank would have nothing: refused on all ranks alike, before any of them runs the model's code
without a token; or served, where the plan says how."""

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.hooks import apply_context_parallel, remove_context_parallel
from tests.zoo import CASES

from .models import MESHES, compare
from .test_plan_words import mesh_of, streams_of


def cut(given, count):
    """With so many tokens of text."""
    return given | {
        "encoder_hidden_states": given["encoder_hidden_states"][:, :count],
        "txt_ids": given["txt_ids"][:count],
    }


def test_all_ranks_refuse_what_one_would_have_nothing_of():
    model = CASES["flux"].build()
    said = set()
    for rank in range(3):
        apply_context_parallel(model, mesh_of(rank))
        with pytest.raises(AttentionProviderError) as caught:
            model(**cut(CASES["flux"].inputs(), 2))
        said.add(str(caught.value))
        remove_context_parallel(model)
    (message,) = said
    assert message.startswith("a tensor [2, 2, 32] is to be split along dimension 1 over 3 ranks, and 'text' has a")


@pytest.mark.parametrize("length", [1, 2])
def test_of_joined_sequences_none_may_be_too_short(length):
    for rank in range(3):
        streams = streams_of(rank)
        streams.split("image", torch.zeros(7), 0)
        with pytest.raises(AttentionProviderError, match=f"'text' has a length of {length} there"):
            streams.split(("text", "image"), torch.zeros(7 + length), 0)


def test_none_of_a_sequence_is_a_part_of_it():
    for rank in range(3):
        assert streams_of(rank).split("text", torch.zeros(2, 0), 1).shape == (2, 0)


def test_one_row_of_rotary_values_is_for_all_tokens(pool):
    ring, ulysses, method = MESHES["ulysses 2"]
    where = {"ring": ring, "ulysses": ulysses, "rotate_method": method}
    for errors in pool.run(2, compare, name="hunyuan_dit, one angle for all tokens", plan=None, **where):
        assert max(errors) < 1e-10
