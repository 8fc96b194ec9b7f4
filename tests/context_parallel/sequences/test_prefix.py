"""Replicated tokens before split ones: those of another sequence, or of a cache."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from diffusers_attn import AttentionProviderError
from diffusers_attn.call import AttentionCall
from diffusers_attn.context_parallel.attention.entry import split_attention
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.sequences.placeholders import LocalTokens
from diffusers_attn.context_parallel.sequences.roles import Role
from diffusers_attn.context_parallel.sequences.sharding import Shards
from diffusers_attn.cp_plans.plan import CPAttention, CPInput

from ..hooks.test_plan_words import mesh_of, tracker_of
from ..models import attention_over_ranks, build, float64_throughout, inputs

ROLE = Role(("image",), ("image",), prefix="before")


def split(rank, before=4, image=7):
    """As a model does that has joined 4 tokens and 7."""
    tracker = tracker_of(rank)
    tracker.replicated.add("before")
    tracker.shard_length("image", image)
    return tracker, tracker.split(("before", "image"), torch.arange(before + image)[None], 1)


def test_it_stays_whole_where_it_is_split_and_a_shard_of_it_is_gathered():
    for rank, (image, own) in enumerate((([4, 5, 6], (0, 2)), ([7, 8], (2, 1)), ([9, 10], (3, 1)))):
        tracker, tokens = split(rank)
        assert tokens.tolist() == [[0, 1, 2, 3, *image]] and tracker.lengths["before"] == 4
        assert tracker.shard_length("before", 4) == 4
        assert tracker.kept(("before", "image")) == LocalTokens(4 + len(image), (own, (4, len(image))))
        assert tracker.kept(("image",)) is None


def test_calls_are_told_apart():
    for rank, own in enumerate((3, 2, 2)):
        tracker, _ = split(rank)
        with pytest.raises(AttentionProviderError, match="every rank has all of 'before'.*CPAttention"):
            tracker.attention(own, 4 + own)
        tracker.role = ROLE
        queries, keys, in_order = tracker.attention(own, 4 + own)
        assert queries == Shards.contiguous(7, 3) and in_order
        assert keys == Shards.joint(Shards.contiguous(4, 3), Shards.contiguous(7, 3))
        for query_len, key_len in ((2, 2), (4, 4), (2, 4), (own, own)):  # among those before
            assert tracker.attention(query_len, key_len) is None
        for query_len, key_len in ((4 + own, 4 + own), (7, 11), (4, 4 + own)):
            with pytest.raises(AttentionProviderError, match="mix"):
                tracker.attention(query_len, key_len)


def test_a_cache_is_as_long_as_it_is():
    for rank, own in enumerate((3, 2, 2)):
        tracker, tokens = split(rank, before=0)
        assert tokens.shape[1] == own
        tracker.role = ROLE
        for cached in (0, 1, 5):
            _, keys, _ = tracker.attention(own, cached + own)
            assert keys == Shards.joint(Shards.contiguous(cached, 3), Shards.contiguous(7, 3))
            (start, length), last = tracker.kept(("image",), cached).spans if cached else ((0, 0), None)
            assert last in (None, (cached, own)) and start + length <= cached


def test_a_plan_says_it():
    model = nn.Module()
    model.block, model.forward = nn.Identity(), lambda x: model.block(x)
    plan = {"": {"x": CPInput(1, sequence=("text", "image"))}, "block": CPAttention(("image",), prefix="text")}
    tracker = apply_context_parallel(model, mesh_of(0), plan)
    assert tracker.replicated == {"text"}


def test_a_mask_of_blocks_is_refused_for_what_it_is():
    """Though the model has filled its tokens up to whole blocks, so that lengths fit nothing."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
    tracker, _ = split(0)
    tracker.role = ROLE
    query = torch.zeros(1, 128, 4, 8)
    with pytest.raises(AttentionProviderError, match="attn_mask is a BlockMask.*a processor that makes none"):
        split_attention(AttentionCall(query, query, query, mask, provider="flex"), tracker)


@float64_throughout()
def keys_of_a_cache(meshes, name):
    """Largest differences from one process: of a step that fills a cache, of what it holds, and of one that reads it;
    and of the gradients of both."""
    mesh = meshes(2, 1)
    results = []
    for split in (False, True):
        model, given = build(name), inputs(name)
        if split:
            apply_context_parallel(model, mesh)
        with attention_over_ranks():
            first = model(**given).sample
            cached = [tensor for layer in given["kv_cache"].layer_caches for tensor in layer.get()]
            last = model(**{**given, "kv_cache_mode": "cached", "hidden_states": given["hidden_states"] * 2}).sample
        grads = torch.autograd.grad(first.square().mean() + last.square().mean(), model.parameters())
        if split:
            grads = [torch.stack(list(_everyones(grad, mesh))).mean(dim=0) for grad in grads]
        results.append([first, *cached, last, *grads])
    return max((one - other).abs().max().item() for one, other in zip(*results))


def _everyones(tensor, mesh):
    from diffusers_attn.context_parallel.sequences.sharding import gather

    return gather(tensor[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh)


def test_a_model_fills_a_cache_and_reads_it(pool):
    for error in pool.run(2, keys_of_a_cache, name="qwenimage21, filling a cache"):
        assert error < 1e-10
