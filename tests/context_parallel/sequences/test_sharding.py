"""Split and gather: which tokens, in which order, and gradients whose plain mean over ranks is the true one."""

import pytest
import torch

from diffusers_attn.context_parallel.sequences.causal_tiles import tiles
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, in_order, out_of_order, split

LENGTHS = [0, 1, 2, 3, 7, 8, 13]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_has_one_rank(length, ranks):
    contiguous, zigzag = Shards.contiguous(length, ranks), Shards.zigzag(length, ranks)
    for shards in (contiguous, zigzag, Shards.joint(contiguous, zigzag)):
        tokens = [start + index for spans in shards.spans for start, size in spans for index in range(size)]
        assert sorted(tokens) == list(range(shards.total))
    sizes = contiguous.sizes
    assert sorted(sizes, reverse=True) == list(sizes)  # the first ranks have more
    assert max(sizes) - min(sizes) <= 1


def test_streams_are_split_each_on_its_own():
    shards = Shards.joint(Shards.contiguous(3, 2), Shards.contiguous(5, 2))
    assert shards.spans == (((0, 2), (3, 3)), ((2, 1), (6, 2)))
    tokens = torch.arange(8)
    assert split(tokens, shards, 0, 0).tolist() == [0, 1, 3, 4, 5]
    assert split(tokens, shards, -1, 1).tolist() == [2, 6, 7]


@pytest.mark.parametrize("spans", [((0, 3),), ((6, 2), (0, 3)), ((4, 0), (9, 1), (2, 2)), ((0, 0),)])
def test_order_and_back(spans):
    tokens = torch.tensor([start + index for start, size in spans for index in range(size)])
    assert in_order(tokens, spans, 0).tolist() == sorted(tokens.tolist())
    assert out_of_order(in_order(tokens, spans, 0), spans, 0).tolist() == tokens.tolist()


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (7, 12), (12, 5), (2, 2), (3, 9)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_tiles_cover_what_causal_attention_sees_once(order, queries, keys, ranks):
    query_shards, key_shards = getattr(Shards, order)(queries, ranks), getattr(Shards, order)(keys, ranks)
    seen = torch.zeros(queries, keys, dtype=torch.int64)
    for query_spans in query_shards.spans:
        rows = torch.tensor([start + index for start, size in query_spans for index in range(size)])
        for key_spans in key_shards.spans:
            columns = torch.tensor([start + index for start, size in key_spans for index in range(size)])
            for tile in tiles(query_spans, key_spans, is_causal=True):
                part = torch.ones(tile.query[1], tile.key[1], dtype=torch.int64)
                if tile.is_causal:
                    assert tile.query[1] == tile.key[1]
                    part = part.tril()
                seen[rows[slice(tile.query[0], sum(tile.query))][:, None], columns[tile.key[0] : sum(tile.key)]] += part
    assert torch.equal(seen, torch.ones(queries, keys, dtype=torch.int64).tril())


def test_zigzag_gives_every_rank_the_same_work_in_few_calls():
    shards = Shards.zigzag(48, 4)
    work = []
    for query_spans in shards.spans:
        calls = [tile for key_spans in shards.spans for tile in tiles(query_spans, key_spans, is_causal=True)]
        assert len(calls) == 4  # one for each rank's keys
        work.append(sum(tile.query[1] * tile.key[1] / (2 if tile.is_causal else 1) for tile in calls))
    assert len(set(work)) == 1


def two_layers(x, before, inside, after, outer):
    """A model with parameters before the split, between split and gather, and after the gather."""
    split_, gather_ = outer if outer else (lambda x: x, lambda x: x)
    x = split_((x @ before).tanh())
    x = (x @ inside).tanh()
    return ((gather_(x) @ after) ** 2).mean()


def gradients(meshes, ring, ulysses, lengths, orders):
    """Largest difference between the mean of the ranks' gradients and the single process's, for every length."""
    mesh = meshes(ring, ulysses)
    errors = {}
    for length in lengths:
        for order in orders:
            shards = getattr(Shards, order)(length, mesh.size)
            x = torch.randn(2, length, 5, dtype=torch.float64)
            parameters = [torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
            pair = (lambda x, s=shards: split(x, s, 1, mesh.rank)), (lambda x, s=shards: gather(x, s, -2, mesh))
            expected_loss, loss = two_layers(x, *parameters, None), two_layers(x, *parameters, pair)
            expected = torch.autograd.grad(expected_loss, parameters)
            found = torch.autograd.grad(loss, parameters)
            mean = [grad.clone() for grad in found]
            for grad in mean:
                # The sum over the mesh: a gather of all ranks' and a local sum, so that no other group is needed.
                every = gather(grad[None], Shards.contiguous(mesh.size, mesh.size), 0, mesh)
                grad.copy_(every.mean(dim=0))
            differences = [loss - expected_loss, *(one - other for one, other in zip(mean, expected))]
            errors[length, order] = max(difference.abs().max().item() for difference in differences)
    return errors


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (3, 1), (1, 4), (2, 2)])
def test_the_mean_over_ranks_is_the_gradient(pool, ring, ulysses):
    arguments = {"ring": ring, "ulysses": ulysses, "lengths": LENGTHS[1:], "orders": ("contiguous", "zigzag")}
    for errors in pool.run(ring * ulysses, gradients, **arguments):
        assert not {case: error for case, error in errors.items() if not error < 1e-12}
