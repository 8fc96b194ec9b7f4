"""Masks made of rectangles: each pair is computed once, without a mask, and ranks agree with a dense mask."""

from __future__ import annotations

import random

import pytest
import torch

from diffusers_attn import AttentionProviderError
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.sequences.rectangles import Rectangle, tiles_within
from diffusers_attn.context_parallel.sequences.sharded_masks import RectangleMask, RowMask
from diffusers_attn.context_parallel.sequences.sharding import Shards

from ..hooks.test_plan_words import mesh_of
from ..models import MESHES

QUERIES, KEYS = 23, 31
# The last two queries see nothing, and no query the last key.
SEEN = (
    Rectangle((0, 12), (5, 20)),
    Rectangle((0, 3), (0, 2)),
    Rectangle((3, 9), (1, 4)),
    Rectangle((12, 9), (0, 7)),
    Rectangle((14, 5), (9, 21)),
)


def dense(seen, queries=QUERIES, keys=KEYS):
    mask = torch.zeros(queries, keys, dtype=torch.int)
    for (start, length), (first, count) in seen:
        mask[start : start + length, first : first + count] += 1
    assert mask.max() <= 1
    return mask.bool()


def cut(length, parts, rng):
    ends = sorted(rng.sample(range(1, length), parts - 1))
    return [(start, end - start) for start, end in zip([0, *ends], [*ends, length])]


def test_every_pair_is_in_one_call():
    rng = random.Random(0)
    mask = dense(SEEN)
    for _ in range(50):
        found = torch.zeros(QUERIES, KEYS, dtype=torch.int)
        queries, keys = cut(QUERIES, 4, rng), cut(KEYS, 5, rng)
        rng.shuffle(keys)
        for own, available in ((queries[:2], keys[:3]), (queries[2:], keys[:3]), (queries, keys[3:])):
            rows = torch.cat([torch.arange(start, start + length) for start, length in own])
            columns = torch.cat([torch.arange(start, start + length) for start, length in available])
            for tile in tiles_within(SEEN, tuple(own), tuple(available)):
                assert not tile.is_causal and tile.query[1] > 0 and tile.key[1] > 0
                of_queries, of_keys = (slice(start, start + length) for start, length in tile[:2])
                found[rows[of_queries][:, None], columns[of_keys]] += 1
        assert torch.equal(found, mask.int())


def test_neighbours_are_one_call():
    seen = tuple(Rectangle((frame * 4, 4), (0, 9)) for frame in range(3))
    assert tiles_within(seen, ((0, 12),), ((0, 9),)) == [((0, 12), (0, 9), False)]


def compare(meshes, ring, ulysses, rotate_method, seen):
    """Largest differences, of the output and of gradients, to the same mask for every token."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    queries = Shards.contiguous(QUERIES, mesh.size)
    keys = Shards.joint(Shards.contiguous(11, mesh.size), Shards.contiguous(KEYS - 11, mesh.size))
    rank, generator = mesh.rank, torch.Generator().manual_seed(0)

    def drawn(shards, heads):
        full = torch.randn(2, shards.total, heads, 8, dtype=torch.float64, generator=generator)
        return torch.cat([full[:, start : start + length] for start, length in shards.spans[rank]], dim=1)

    given = [drawn(queries, 4), drawn(keys, 2), drawn(keys, 2)]
    ((start, length),) = queries.spans[rank]
    masks = RectangleMask(seen), RowMask(dense(seen)[None, None, start : start + length])
    found = []
    for mask in masks:
        leaves = [each.clone().requires_grad_() for each in given]
        out = parallel_attention(*leaves, mask, mesh=mesh, query_shards=queries, key_shards=keys)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    return [(one - other).abs().max().item() if one.numel() else 0.0 for one, other in zip(*found)]


@pytest.mark.parametrize("mesh", MESHES)
def test_like_a_mask_for_every_token(pool, mesh):
    ring, ulysses, method = MESHES[mesh]
    for errors in pool.run(ring * ulysses, compare, ring=ring, ulysses=ulysses, rotate_method=method, seen=SEEN):
        assert max(errors) < 1e-12


@pytest.mark.parametrize(
    ("seen", "options", "reason"),
    [
        (
            (Rectangle((0, 4), (0, 4)),),
            {"is_causal": True},
            "is_causal cannot be combined with a mask of blocks or rectangles",
        ),
        ((Rectangle((0, 4), (28, 4)),), {}, r"Rectangle\(query=\(0, 4\), key=\(28, 4\)\), .* 23 queries and 31 keys"),
    ],
)
def test_refused(seen, options, reason):
    shards = {"query_shards": Shards.contiguous(QUERIES, 3), "key_shards": Shards.contiguous(KEYS, 3)}
    query, key = torch.zeros(1, 8, 2, 8), torch.zeros(1, 11, 2, 8)
    with pytest.raises(AttentionProviderError, match=reason):
        parallel_attention(query, key, key, RectangleMask(seen), mesh=mesh_of(0), **shards, **options)
