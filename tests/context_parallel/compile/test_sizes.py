"""Changing sizes over ranks compile two graphs: one for the first size, and one for all others."""

import functools

import pytest
import torch

from diffusers_attn.context_parallel.hooks import dynamic_sizes

from ...marks import thorough_but
from .sized import walk

# text and image tokens: even and uneven shards, on two ranks and three, and sizes that were there before
SIZES = [(8, 35), (13, 46), (8, 35), (9, 24), (12, 49), (13, 50), (10, 23), (16, 64), (11, 31), (8, 36)]
STRATEGIES = (
    "ulysses 2", "gather 2", "ring 2", "ulysses 3", "gather 3", "ring 3", "gather 2 x ulysses 2", "ring 2 x ulysses 2",
)  # fmt: skip


@functools.cache
def graphs_of_one_process(sizes, **arguments):
    return walk(None, None, sizes, **arguments)[0]


def check(pool, mesh, sizes=SIZES, **arguments):
    one = graphs_of_one_process(tuple(sizes), **arguments)
    ranks = 4 if "x" in mesh else int(mesh[-1])
    for graphs, error in pool.run(ranks, walk, mesh=mesh, sizes=sizes, **arguments):
        assert error < 1e-10
        assert graphs == one


# Sizes reach a graph as heads or as tokens are split; a ring is below.
@pytest.mark.parametrize("mesh", thorough_but(["ulysses 2", "gather 2"], STRATEGIES))
def test_ten_sizes(pool, mesh):
    check(pool, mesh, masked=True)


# One sequence changes before the other; a rank's shard, and the number of all tokens, may stay as they were.
APART = [(8, 35), (8, 36), (8, 37), (9, 38), (10, 37), (8, 35), (12, 51)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", thorough_but(["ring 2"], ["ring 2", "gather 3"]))
def test_shards_that_change_apart(pool, mesh):
    for graphs, error in pool.run(int(mesh[-1]), walk, mesh=mesh, sizes=APART, masked=mesh == "gather 3"):
        assert error < 1e-10
        assert graphs == [1, 2, 2, 2, 2, 2, 2]


@pytest.mark.slow
def test_a_whole_model_makes_twice_the_graphs_and_none_after_the_second_size(pool):
    """Dynamo compiles the hooks of the outermost module by themselves: what splits its inputs is a graph of its own."""
    sizes = SIZES[:2] + SIZES[3:6]
    assert graphs_of_one_process(tuple(sizes), scope="full") == [1, 2, 2, 2, 2]
    for graphs, error in pool.run(2, walk, mesh="gather 2", sizes=sizes, scope="full"):
        assert error < 1e-10
        assert graphs == [2, 4, 4, 4, 4]


def test_dynamo_reads_the_private_mark():
    """Of two sizes, the first with the mark makes a graph that serves the second, too; without it, none does."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled_for(*tensors):
        torch._dynamo.reset()
        graphs.clear()
        double = torch.compile(lambda tensor: tensor * 2, backend=count)
        for tensor in tensors:
            double(tensor)
        return len(graphs)

    tensors = torch.ones(5), torch.ones(7)
    assert compiled_for(*tensors) == 2
    for tensor in tensors:
        dynamic_sizes._mark(tensor, frozenset(tensor.shape))
    assert compiled_for(*tensors) == 1, (
        f"PyTorch {torch.__version__} does not read Tensor.{dynamic_sizes._MARK}: find the new name in "
        "torch/_dynamo/variables/builder.py, and put it into diffusers_attn/context_parallel/hooks/dynamic_sizes.py"
    )
