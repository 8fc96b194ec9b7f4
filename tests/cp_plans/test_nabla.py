"""Models whose layers choose blocks of keys (NABLA): over ranks as in one process, or refused."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky, transformer_kandinsky6_sr

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.block_masks import block_mask
from diffusers_attn.context_parallel.sequences.sharded_masks import BlockRowMask
from diffusers_attn.context_parallel.sequences.sharding import Shards
from diffusers_attn.context_parallel.sequences.tracker import SequenceTracker
from diffusers_attn.cp_plans import advanced
from diffusers_attn.processors import nabla

from ..context_parallel.models import DISTINCT, MESHES
from ..marks import thorough_but
from .nabla import compare, compare_flex, compiled, refusal

NAMES = ["kandinsky5", "kandinsky6_sr"]


def results(pool, job, mesh, **options):
    ring, ulysses, method = MESHES[mesh]
    return pool.run(ring * ulysses, job, ring=ring, ulysses=ulysses, rotate_method=method, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", [*DISTINCT, "ring 2 x ulysses 2"])
def test_like_one_process(pool, mesh, name):
    errors = results(pool, compare, mesh, name=name)
    assert max(map(max, errors)) < 1e-10, errors


@pytest.mark.parametrize("name", NAMES)
def test_without_exchange_it_is_wrong(pool, name):
    errors = results(pool, compare, "gather 2", name=name, disabled=True)
    assert min(map(min, errors)) > 1e-4, errors


@pytest.mark.parametrize("name", NAMES)
def test_with_gradient_checkpointing(pool, name):
    errors = results(pool, compare, "gather 2 x ulysses 2", name=name, checkpointing=True)
    assert max(map(max, errors)) < 1e-10, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", thorough_but(["ring 3"], ["ulysses 3", "ring 3", "gather 2 x ulysses 2"]))
def test_by_block_masks(pool, name, mesh):
    """Through flex: also the layers of Kandinsky 5 without a mask, in float32."""
    errors = results(pool, compare_flex, mesh, name=name, provider="flex")
    assert max(errors) < 2e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "provider"),
    thorough_but([("kandinsky6_sr", "flex")], [("kandinsky5", "native"), ("kandinsky6_sr", "flex")]),
)
def test_compiles_without_breaks(pool, name, provider):
    for graphs, errors in pool.run(2, compiled, ring=2, ulysses=1, name=name, provider=provider):
        assert graphs <= 5  # as many as without a mask, and no more with more blocks
        assert max(errors) < 1e-5


@pytest.mark.parametrize(
    ("name", "provider", "frames", "reason"),
    [
        ("kandinsky5", None, 5, "Kandinsky5AttnProcessor, sees only this rank's. Bind the module"),
        ("kandinsky6_sr", None, 5, "Kandinsky6SRAttnProcessor, sees only this rank's. Bind the module"),
        ("kandinsky5", "native", 1, "'video' has 128 tokens, .* blocks of 64; each of 3"),
        ("kandinsky6_sr", "native", 5, "'flex' cannot serve this call: .*no backward on cpu"),
    ],
)
def test_refused(pool, name, provider, frames, reason):
    """On all ranks alike, before attention exchanges anything."""
    answers = pool.run(3, refusal, ring=3, ulysses=1, name=name, provider=provider, frames=frames)
    for answer in answers:
        assert re.search(reason, answer), answer


def tracker_of(rank):
    return SequenceTracker(ContextParallelMesh(ContextParallelConfig(3), Group("none", rank, 3), ALONE))


def test_a_sequence_is_split_between_blocks():
    tokens = torch.arange(5 * 64)
    for rank, (start, end) in enumerate([(0, 128), (128, 256), (256, 320)]):
        tracker = tracker_of(rank)
        tracker.keep_blocks("video", 64)
        assert torch.equal(tracker.split("video", tokens, 0), tokens[start:end])
        assert tracker.shards(("video",)).in_blocks(64).sizes == (2, 2, 1)
        tracker.clear()  # the next forward may be without
        assert tracker.split("video", tokens, 0).shape == (107 - (rank == 2),)


def test_what_is_no_blocks_is_refused():
    tracker = tracker_of(0)
    tracker.keep_blocks("video", 64)
    for length in (5 * 64 + 1, 2 * 64):  # a part of a block; fewer than ranks
        with pytest.raises(AttentionProviderError, match=f"'video' has {length} tokens, .* blocks of 64; .* 3 ranks"):
            tracker.split("video", torch.zeros(length), 0)
    tracker.clear()
    tracker.split("video", torch.zeros(5 * 64), 0)
    with pytest.raises(AttentionProviderError, match="was split otherwise before"):
        tracker.keep_blocks("video", 64)
    with pytest.raises(ValueError, match="size=0"):
        advanced.CPBlocks("video", 0)


def call(mask, **options):
    """Of 2 blocks of queries and 5 of keys on rank 0 of 3."""
    tracker = tracker_of(0)
    tracker.keep_blocks("video", 64)
    tracker.split("video", torch.zeros(5 * 64), 0)
    shards = tracker.shards(("video",))
    query = torch.zeros(1, 128, 2, 8)
    shards = {"query_shards": shards, "key_shards": shards} | options
    return parallel_attention(query, query, query, mask, mesh=tracker.mesh, **shards)


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        (torch.ones(1, 1, 2, 4, dtype=torch.bool), {}, r"bool \[batch, heads, 2, 5\]"),
        (torch.ones(1, 1, 2, 5), {}, r"torch.float32 .*bool \[batch, heads, 2, 5\]"),
        (
            torch.ones(1, 1, 2, 5, dtype=torch.bool),
            {"is_causal": True},
            "is_causal cannot be combined with a mask of blocks",
        ),
        (
            torch.ones(1, 1, 2, 5, dtype=torch.bool),
            dict.fromkeys(("query_shards", "key_shards"), Shards(((((0, 128),)), ((128, 96),), ((224, 96),)))),
            r"are not complete blocks.*CPBlocks",
        ),
    ],
)
def test_masks_by_blocks_that_are_refused(mask, options, reason):
    with pytest.raises(AttentionProviderError, match=reason):
        call(BlockRowMask(mask, 64), **options)


def test_a_block_mask_says_the_same_to_both_forms_of_flex_attention():
    """The kernel reads lists of blocks, and the uncompiled form calls the function."""
    blocks = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    blocks[0, 0, 1] = False
    mask = block_mask(blocks, 8)
    assert mask.shape == (2, 3, 32, 48) and mask.kv_num_blocks.sum() == 0
    assert torch.equal(mask.to_dense().bool(), blocks)
    query, key = torch.arange(32)[:, None], torch.arange(48)
    for batch in range(2):
        for head in range(3):
            seen = mask.mask_mod(torch.tensor(batch), torch.tensor(head), query, key)
            assert torch.equal(seen, blocks[batch, head].repeat_interleave(8, 0).repeat_interleave(8, 1))


# Of the source that own code stands in for. Where one differs: read what has changed in diffusers, follow it in
# processors/nabla.py, and write the new value here.
SOURCES = {
    transformer_kandinsky.nablaT_v2: "130e1f02280b4cd1",
    transformer_kandinsky.Kandinsky5AttnProcessor.__call__: "5cc3419de99227d5",
    transformer_kandinsky6_sr.nabla_block_mask: "7ea17020a72bdae3",
    transformer_kandinsky6_sr.Kandinsky6SRAttnProcessor.__call__: "047b50d0e7eb947d",
}


@pytest.mark.parametrize("function", SOURCES, ids=lambda function: function.__qualname__)
def test_what_own_code_stands_in_for_is_unchanged(function):
    found = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    assert found == SOURCES[function], f"{function.__qualname__} has changed: see {nabla.__name__}"


def test_processors_have_the_names_that_they_are_known_by():
    for name in nabla.PROCESSORS:
        module, _, cls = name.rpartition(".")
        assert inspect.isclass(getattr(importlib.import_module(module), cls))
