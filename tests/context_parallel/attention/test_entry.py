"""Attention calls with the masks that models bring, over sequences that a plan has split."""

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

from diffusers_attn import AttentionProviderError, attention_dispatch
from diffusers_attn.call import AttentionCall
from diffusers_attn.context_parallel.attention.entry import split_attention
from diffusers_attn.context_parallel.mesh import ContextParallelMesh
from diffusers_attn.context_parallel.sequences.active import active
from diffusers_attn.context_parallel.sequences.roles import Role
from diffusers_attn.context_parallel.sequences.sharding import split, take
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker

from ... import reference

TEXT, IMAGE, BATCH, HEADS = 5, 14, 2, 4
JOINT = TEXT + IMAGE


def over_ranks(meshes, ring, ulysses):
    """The error of every kind of mask, and the messages of calls that are refused."""
    mesh = meshes(ring, ulysses)
    tracker = SequenceTracker(mesh)
    tracker.split("image", torch.zeros(IMAGE), 0)
    tracker.split("text", torch.zeros(TEXT), 0)
    role = Role(("text", "image"), ("text", "image"))
    shards = tracker.shards(role.query)
    full = [torch.randn(BATCH, JOINT, HEADS, 8, dtype=torch.float64) for _ in range(3)]
    local = [split(tensor, shards, 1, mesh.rank) for tensor in full]
    runs = shards.spans[mesh.rank]

    keys = torch.rand(BATCH, 1, 1, JOINT) > 0.4
    rows = torch.rand(BATCH, 1, JOINT, JOINT) > 0.4
    tokens = torch.rand(BATCH, JOINT) > 0.4
    outer = tokens[:, None, :, None] & tokens[:, None, None, :]
    bias = torch.randn(HEADS, 1, JOINT, dtype=torch.float64)
    count = local[0].shape[1]
    # Name: what arrives at attention on this rank, and the mask of the full sequence that it stands for.
    masks = {
        "none": (None, None),
        "split keys": (take(keys, runs, 3), keys),
        "all keys": (keys, keys),
        "expanded keys": (take(keys, runs, 3).expand(BATCH, HEADS, count, count), keys),
        "one sample's keys": (keys[0, 0], keys[:1]),
        "rows": (take(rows, runs, 2), rows),
        "bias of heads": (bias, bias),
        "outer product": (take(take(outer, runs, 2), runs, 3), outer),
    }
    errors = {}
    for name, (mask, complete) in masks.items():
        tracker.role = role._replace(outer_mask=name == "outer product")
        out = split_attention(AttentionCall(*local, mask), tracker)
        expected, _ = reference.attention(*(tensor.transpose(1, 2) for tensor in full), complete)
        errors[name] = (out - split(expected.transpose(1, 2), shards, 1, mesh.rank)).abs().max().item()

    tracker.role = role
    assert split_attention(AttentionCall(local[0], full[1][:, :7], full[2][:, :7]), tracker) is None
    refused = {}
    for name, settings in {
        "dropout": {"dropout_p": 0.1},
        "negative dropout": {"dropout_p": -0.1},
        "outer product that nobody announced": {"mask": masks["outer product"][0]},
        "not a tensor": {"mask": [True]},
        "mask of another dtype": {"mask": keys.half()},
        "order": {"mask": keys},
        "causal order": {"is_causal": True},
        "another mesh": {},
    }.items():
        tracker.role = None if "order" in name else role
        used = mesh if name != "another mesh" else meshes(1, 3) if mesh.rank < 3 else meshes(1, 4)
        with pytest.raises(AttentionProviderError) as error:
            split_attention(AttentionCall(*local, **settings), tracker, used)
        refused[name] = str(error.value)
    return errors, refused


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2), (2, 2)])
def test_masks_of_models(pool, ring, ulysses):
    for errors, refused in pool.run(ring * ulysses, over_ranks, ring=ring, ulysses=ulysses):
        assert not {name: error for name, error in errors.items() if not error < 1e-12}
        assert "dropout_p=0.1" in refused["dropout"]
        assert "dropout_p=-0.1 was given; a probability from 0 to 1" in refused["negative dropout"]
        assert "attn_mask has dtype torch.float16 and the query torch.float64" in refused["mask of another dtype"]
        assert "outer product" in refused["outer product that nobody announced"]
        assert "list" in refused["not a tensor"]
        assert "attention_provider and apply_context_parallel" in refused["another mesh"]
        assert "CPAttention" in refused["order"] and "CPAttention" in refused["causal order"]


def forms(meshes, ring):
    """The error of every form of call that SDPA takes, through `attention_dispatch`; and what is refused by name."""
    mesh = meshes(ring, 1) if ring > 1 else ContextParallelMesh.from_degrees(device_type="cpu")
    tracker = SequenceTracker(mesh)
    tracker.split("image", torch.zeros(IMAGE), 0)
    tracker.role = Role(("image",), ("image",))
    shards = tracker.shards(("image",))

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64)

    # Name: shapes of query, key and value but for the tokens, and further arguments.
    heads, some = [HEADS], [2, 3, HEADS]
    calls = {
        "three dimensions": (heads, heads, heads, {}),
        "five dimensions": (some, some, some, {"is_causal": True}),
        "different numbers of them": (heads, [2, HEADS], [1], {}),
        "one query head": ([2, 1], [2, HEADS], [2, HEADS], {}),
        "one key head": ([2, HEADS], [2, 1], [2, HEADS], {}),
        "one batch of keys": ([2, HEADS], [1, HEADS], [1, HEADS], {}),
        "rows": (heads, heads, heads, {"attn_mask": torch.rand(HEADS, IMAGE, IMAGE) > 0.4}),
        "causal": ([2, HEADS], [2, HEADS], [2, HEADS], {"attn_mask": causal_upper_left(IMAGE, IMAGE)}),
        "causal by its local length": ([2, HEADS], [2, HEADS], [2, HEADS], {"attn_mask": causal_lower_right(5, 5)}),
    }
    errors = {}
    active.tracker = tracker
    try:
        for name, (*shapes, rest) in calls.items():
            full = [normal(*shape, IMAGE, 8) for shape in shapes]
            full_options = {"is_causal": True} if name.startswith("causal") else rest
            expected = split(sdpa(*full, **full_options), shards, -2, mesh.rank)
            if name == "rows":
                rest = {"attn_mask": split(rest["attn_mask"], shards, -2, mesh.rank)}
            found = attention_dispatch(*(split(each, shards, -2, mesh.rank) for each in full), **rest)
            assert found.shape == expected.shape, name
            errors[name] = (found - expected).abs().max().item()
        local = split(normal(2, HEADS, IMAGE, 8), shards, -2, mesh.rank)
        nested = torch.nested.nested_tensor([local[0], local[1]])
        refused = []
        if mesh.size > 1:
            for call in (
                lambda: torch.vmap(attention_dispatch)(local, local, local),
                lambda: attention_dispatch(nested, nested, nested),
                lambda: attention_dispatch(local, local, local, causal_lower_right(local.shape[2], 2 * IMAGE)),
            ):
                with pytest.raises(AttentionProviderError) as error:
                    call()
                refused.append(str(error.value))
    finally:
        active.tracker = None
    return errors, refused


@pytest.mark.parametrize("ring", [1, 2])
def test_forms_of_calls(pool, ring):
    for errors, refused in pool.run(ring, forms, ring=ring):
        assert not {name: error for name, error in errors.items() if not error < 1e-12}
        for what, message in zip(("torch.func transform", "nested tensor", "CausalBias"), refused):
            assert what in message and "split over ranks" in message
