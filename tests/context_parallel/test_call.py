"""Attention calls with the masks that models bring, over streams that a plan has split."""

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.call import split_attention
from diffusers_attn.context_parallel.sharding import split, take
from diffusers_attn.context_parallel.streams import Role, Streams

from .. import reference

TEXT, IMAGE, BATCH, HEADS = 5, 14, 2, 4
JOINT = TEXT + IMAGE


def over_ranks(meshes, ring, ulysses):
    """The error of every kind of mask; and what is said of calls that are refused."""
    mesh = meshes(ring, ulysses)
    streams = Streams(mesh)
    streams.split("image", torch.zeros(IMAGE), 0)
    streams.split("text", torch.zeros(TEXT), 0)
    role = Role(("text", "image"), ("text", "image"))
    shards = streams.shards(role.query)
    whole = [torch.randn(BATCH, JOINT, HEADS, 8, dtype=torch.float64) for _ in range(3)]
    local = [split(tensor, shards, 1, mesh.rank) for tensor in whole]
    runs = shards.runs[mesh.rank]

    keys = torch.rand(BATCH, 1, 1, JOINT) > 0.4
    rows = torch.rand(BATCH, 1, JOINT, JOINT) > 0.4
    tokens = torch.rand(BATCH, JOINT) > 0.4
    outer = tokens[:, None, :, None] & tokens[:, None, None, :]
    bias = torch.randn(HEADS, 1, JOINT, dtype=torch.float64)
    count = local[0].shape[1]
    # Name: what arrives at attention on this rank, and the mask of the whole sequence that it stands for.
    masks = {
        "none": (None, None),
        "split keys": (take(keys, runs, 3), keys),
        "whole keys": (keys, keys),
        "expanded keys": (take(keys, runs, 3).expand(BATCH, HEADS, count, count), keys),
        "one sample's keys": (keys[0, 0], keys[:1]),
        "rows": (take(rows, runs, 2), rows),
        "bias of heads": (bias, bias),
        "outer product": (take(take(outer, runs, 2), runs, 3), outer),
    }
    errors = {}
    for name, (mask, complete) in masks.items():
        streams.role = role._replace(outer_mask=name == "outer product")
        out = split_attention(*local, mask, streams=streams, provider="native")
        expected, _ = reference.attention(*(tensor.transpose(1, 2) for tensor in whole), complete)
        errors[name] = (out - split(expected.transpose(1, 2), shards, 1, mesh.rank)).abs().max().item()

    streams.role = role
    assert split_attention(local[0], whole[1][:, :7], whole[2][:, :7], streams=streams, provider="native") is None
    refused = {}
    for name, settings in {
        "dropout": {"dropout_p": 0.1},
        "outer product that nobody announced": {"attn_mask": masks["outer product"][0]},
        "not a tensor": {"attn_mask": [True]},
        "order": {"attn_mask": keys},
        "causal order": {"is_causal": True},
        "another mesh": {"mesh": meshes(1, 3) if mesh.rank < 3 else meshes(1, 4)},
    }.items():
        streams.role = None if "order" in name else role
        with pytest.raises(AttentionProviderError) as error:
            split_attention(*local, **settings, streams=streams, provider="native")
        refused[name] = str(error.value)
    return errors, refused


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2), (2, 2)])
def test_masks_of_models(pool, ring, ulysses):
    for errors, refused in pool.run(ring * ulysses, over_ranks, ring=ring, ulysses=ulysses):
        assert not {name: error for name, error in errors.items() if not error < 1e-12}
        assert "dropout_p=0.1" in refused["dropout"]
        assert "outer product" in refused["outer product that nobody announced"]
        assert "list" in refused["not a tensor"]
        assert "apply_context_parallel was given" in refused["another mesh"]
        assert "CPAttention" in refused["order"] and "CPAttention" in refused["causal order"]
