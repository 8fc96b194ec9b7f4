"""Tensors and masks that do not have the lengths of the split sequences are refused, before anything is sent."""

from __future__ import annotations

import re

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.call import AttentionCall
from diffusers_attn.context_parallel.attention.entry import split_attention
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.sequences.roles import Role

from ..hooks.test_plan_words import mesh_of, tracker_of

RANK = 1


def tracker_with(**lengths):
    """On the second of three ranks."""
    tracker = tracker_of(RANK)
    for name, length in lengths.items():
        tracker.split(name, torch.zeros(length), 0)
    return tracker


TENSORS = {
    "joined, and shorter than one of them": (
        lambda tracker: tracker.split(("text", "image"), torch.zeros(5), 0),
        "a tensor [5] should hold text and image, joined along dimension 0, and they are longer",
    ),
    "shorter than there are ranks": (
        lambda tracker: tracker.split("rows", torch.zeros(4, 2), 1),
        "'rows' has a length of 2 there, too short for every rank to have a part. Use 2 ranks or fewer",
    ),
    "no multiple, once for every sample": (
        lambda tracker: tracker.split("text", torch.zeros(15), 0, flattened=True),
        "should have sequence 'text' once for every sample in dimension 0, and this is no multiple of its length",
    ),
    "no multiple, of several tokens for each entry": (
        lambda tracker: tracker.split_groups("text", torch.zeros(15), 0),
        "a tensor [15] should have as many tokens for each of 'text' in dimension 0",
    ),
    "gathered, and of no length that was split": (
        lambda tracker: tracker.gather(None, torch.zeros(1, 9), 1),
        "to be gathered along dimension 1, and no sequence has 9 tokens on rank 1",
    ),
    "gathered by a name that was not split": (
        lambda tracker: tracker.gather("audio", torch.zeros(3), 0),
        "no tensor of sequence 'audio' has been split before it is gathered or joined",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_does_not_fit(what):
    call, message = TENSORS[what]
    with pytest.raises(AttentionProviderError, match=re.escape(message)):
        call(tracker_with(text=7, image=11))


def test_a_length_that_fits_two_sequences_of_other_ranks():
    """Of 7 and 8 tokens, this rank has 2 and 3, and the first one 3 of both."""
    tracker = tracker_of(0)
    for name, length in {"text": 7, "image": 8}.items():
        tracker.split(name, torch.zeros(length), 0)
    with pytest.raises(AttentionProviderError, match=r"a CPOutput, 3 tokens .* of 8 tokens or of 7 .*Name the seq"):
        tracker.gather(None, torch.zeros(3), 0)


def attention(queries, keys, mask=None, query_heads=2):
    query, key = torch.zeros(1, queries, query_heads, 8), torch.zeros(1, keys, 2, 8)
    return AttentionCall(query, key, key, mask)


@pytest.mark.parametrize(
    ("role", "mask", "message"),
    [
        ({"key_mask": True}, (1, 4), "by its plan it has one row, with columns for all 11 keys"),
        ({"key_mask": True}, (4, 11), "by its plan it has one row, with columns for all 11 keys"),
        ({"row_mask": True}, (4, 4), "it has rows for this rank's 4 queries and columns for all 11 keys"),
        ({"row_mask": True}, (1, 11), "it has rows for this rank's 4 queries and columns for all 11 keys"),
    ],
)
def test_a_mask_that_is_not_the_plans(role, mask, message):
    tracker = tracker_with(image=11)
    tracker.role = Role(("image",), ("image",), **role)
    with pytest.raises(AttentionProviderError, match=re.escape(message)):
        split_attention(attention(4, 4, torch.ones(1, 1, *mask, dtype=torch.bool)), tracker)


def test_a_mask_whose_meaning_the_ranks_may_take_differently():
    """Of four tokens, two ranks have one: their mask of keys has the shape of a row for a single query."""
    tracker = tracker_with(image=4)
    with pytest.raises(AttentionProviderError, match="a mask's shape does not tell every rank what it means"):
        split_attention(attention(1, 1, torch.ones(1, 1, 1, 4, dtype=torch.bool)), tracker)


def test_tokens_that_are_not_split():
    """Split queries attend to keys that every rank has, alone; as many of both are a mistake."""
    tracker = tracker_with(image=11)
    assert split_attention(attention(4, 11), tracker) is None
    with pytest.raises(AttentionProviderError, match="a mix of tokens that are split and tokens that are replicated"):
        split_attention(attention(11, 11), tracker)


def test_heads_that_do_not_divide():
    shards = tracker_with(image=11).shards(("image",))
    call = attention(4, 4, query_heads=3)
    with pytest.raises(AttentionProviderError, match="got 3 query heads and 2 key heads; .* multiple of the number"):
        parallel_attention(call.query, call.key, call.value, mesh=mesh_of(RANK), query_shards=shards, key_shards=shards)
