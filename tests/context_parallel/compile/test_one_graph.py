"""Every strategy in one graph, forward and backward."""

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm import collectives
from diffusers_attn.context_parallel.compile import inductor
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, split

from ...marks import slow_but

STRATEGIES = {"ulysses": (1, 2, "allgather"), "ring": (2, 1, "alltoall"), "gather": (2, 1, "allgather")}


def compare(meshes, ring, ulysses, rotate_method, backend, length=11, heads=3, masked=False, is_causal=False):
    """Number of graphs, and the largest difference to eager mode, on this rank."""
    mesh = meshes(ring, ulysses, rotate_method=rotate_method)
    shards = Shards.contiguous(length, mesh.size)
    inputs = [torch.randn(2, length, heads, 8, requires_grad=True) for _ in range(3)]
    mask = KeyMask(split(torch.rand(2, length) > 0.3, shards, 1, mesh.rank)) if masked else None

    def layer(*tensors):
        local = [split(tensor * 2, shards, 1, mesh.rank) for tensor in tensors]
        out = parallel_attention(*local, mask, mesh=mesh, query_shards=shards, key_shards=shards, is_causal=is_causal)
        return gather(out.sin(), shards, 1, mesh)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
    results = []
    for function in (layer, compiled):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    with torch.no_grad():
        results[1].append(compiled(*inputs))
        results[0].append(results[0][0])
    torch._dynamo.reset()
    return counter.frame_count, max((one - other).abs().max().item() for one, other in zip(*results))


def check(answers):
    for graphs, error in answers:
        assert graphs == 2  # with and without gradients
        assert error < 3e-5  # of values up to 10, in float32


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("masked", slow_but([True], [False, True]))
def test_one_graph(pool, strategy, masked):
    ring, ulysses, method = STRATEGIES[strategy]
    check(pool.run(2, compare, ring=ring, ulysses=ulysses, rotate_method=method, backend="aot_eager", masked=masked))


# A compiler drops what nobody uses: here ranks receive what they have no use for.
NOTHING_TO_DO = {
    "causal ring": (3, 1, "alltoall", {"is_causal": True}),
    "causal gather": (3, 1, "allgather", {"is_causal": True}),
    "no tokens, ring": (3, 1, "alltoall", {"length": 1, "masked": True}),
    "no tokens, gather": (3, 1, "allgather", {"length": 2, "masked": True}),
    "no heads, ulysses": (1, 3, "allgather", {"heads": 1, "masked": True}),
    "no heads, unified": (2, 2, "alltoall", {"heads": 1, "masked": True}),
}


# Inductor, which takes long, does so in more ways than the compiler before it.
INDUCTOR = ("causal gather", "no tokens, ring")


@pytest.mark.parametrize(
    ("case", "backend"),
    slow_but(
        [("no tokens, gather", "aot_eager")],
        [(case, "inductor" if case in INDUCTOR else "aot_eager") for case in NOTHING_TO_DO],
    ),
)
def test_ranks_without_work_take_part(pool, case, backend):
    ring, ulysses, method, options = NOTHING_TO_DO[case]
    arguments = {"ring": ring, "ulysses": ulysses, "rotate_method": method, "backend": backend}
    check(pool.run(ring * ulysses, compare, **arguments, **options))


def gaps(meshes, orders_agree):
    """Whether Inductor may leave gaps once an exchange was compiled, by a PyTorch before or after `orders_agree`."""
    from torch._inductor import config

    group = meshes(2, 1).ring

    def send(tensor):
        return collectives.wait(collectives.start_gather_others(tensor.sin(), (3, 3), group), group)

    torch._dynamo.reset()
    real, tensor = inductor.ORDERS_AGREE, torch.ones(3, 2)
    try:
        inductor.ORDERS_AGREE = Version(orders_agree)
        inductor._prepare.cache_clear()
        with config.patch(comprehensive_padding=True):
            assert torch.equal(torch.compile(send, fullgraph=True, backend="aot_eager")(tensor), tensor.sin())
            return config.comprehensive_padding
    finally:
        inductor.ORDERS_AGREE = real
        inductor._prepare.cache_clear()


@pytest.mark.parametrize(("orders_agree", "allowed"), [("99", False), ("2.0", True)])
def test_a_compiler_that_misreads_gaps_leaves_none(pool, orders_agree, allowed):
    """What comes of them on a GPU is seen by `tests/gpu/test_context_parallel.py`, with Wan in bfloat16."""
    assert pool.run(2, gaps, orders_agree=orders_agree) == [allowed] * 2
