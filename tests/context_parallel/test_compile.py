"""Every strategy in one graph, forward and backward."""

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn.context_parallel import exchange
from diffusers_attn.context_parallel.inductor import ORDERS_AGREE
from diffusers_attn.context_parallel.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sharding import Shards, gather, split
from diffusers_attn.context_parallel.unified import parallel_attention

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
@pytest.mark.parametrize("masked", [False, True])
def test_one_graph(pool, strategy, masked):
    ring, ulysses, method = STRATEGIES[strategy]
    check(pool.run(2, compare, ring=ring, ulysses=ulysses, rotate_method=method, backend="aot_eager", masked=masked))


# A compiler drops what nobody uses: here ranks receive what they have no use for.
NOTHING_TO_DO = {
    "causal ring": (3, 1, "alltoall", {"is_causal": True}),
    "causal gather": (3, 1, "allgather", {"is_causal": True}),
    "causal unified": (2, 2, "allgather", {"is_causal": True}),
    "no tokens, ring": (3, 1, "alltoall", {"length": 1, "masked": True}),
    "no tokens, gather": (3, 1, "allgather", {"length": 2, "masked": True}),
    "no heads, ulysses": (1, 3, "allgather", {"heads": 1, "masked": True}),
    "no heads, unified": (2, 2, "alltoall", {"heads": 1, "masked": True}),
}


# Inductor, which takes long, does so in more ways.
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, "aot_eager") for case in NOTHING_TO_DO] + [("causal gather", "inductor"), ("no tokens, ring", "inductor")],
)
def test_ranks_without_work_take_part(pool, case, backend):
    ring, ulysses, method, options = NOTHING_TO_DO[case]
    arguments = {"ring": ring, "ulysses": ulysses, "rotate_method": method, "backend": backend}
    check(pool.run(ring * ulysses, compare, **arguments, **options))


def constraint(meshes):
    """What Inductor is told of the layout of what is sent, once an exchange was compiled; and whether gaps are on."""
    from torch._inductor import config, lowering

    group = meshes(2, 1).ring

    def send(tensor):
        return exchange.wait(exchange.start_gather_others(tensor.sin(), (3, 3), group), group)

    torch._dynamo.reset()
    tensor = torch.ones(3, 2)
    assert torch.equal(torch.compile(send, fullgraph=True, backend="aot_eager")(tensor), tensor.sin())
    found = lowering.maybe_layout_constraints(torch.ops._c10d_functional.all_to_all_single.default)
    return found.__name__, config.comprehensive_padding


def test_a_compiler_leaves_no_gaps_in_what_is_sent(pool):
    """It does so on GPUs only; `tests/gpu/test_context_parallel.py` shows what comes of it, with Wan in bfloat16."""
    gaps = Version(torch.__version__) >= ORDERS_AGREE
    assert pool.run(2, constraint) == [("require_contiguous_strides", gaps)] * 2
