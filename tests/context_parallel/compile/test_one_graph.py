"""Every strategy in one graph, forward and backward."""

import pytest
import torch
from functorch.compile import make_boxed_func
from packaging.version import Version
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.comm import collectives
from diffusers_attn.context_parallel.compile import inductor
from diffusers_attn.context_parallel.sequences.sharded_masks import KeyMask
from diffusers_attn.context_parallel.sequences.sharding import Shards, gather, split

from ...marks import thorough_but

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


@pytest.mark.parametrize(
    "strategy", ["gather", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ulysses", "ring"))]
)
@pytest.mark.parametrize("masked", thorough_but([True], [False, True]))
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


# Inductor, which takes long, drops in more ways than the compiler before it.
INDUCTOR = ("causal gather", "no tokens, ring")


# One for each reason to have nothing to do: no keys to see, no tokens, no heads.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("no tokens, gather", "aot_eager"),
        *thorough_but(
            [("causal ring", "aot_eager"), ("no tokens, ring", "inductor"), ("no heads, ulysses", "aot_eager")],
            [
                (case, "inductor" if case in INDUCTOR else "aot_eager")
                for case in NOTHING_TO_DO
                if case != "no tokens, gather"
            ],
        ),
    ],
)
def test_ranks_without_work_take_part(pool, case, backend):
    ring, ulysses, method, options = NOTHING_TO_DO[case]
    arguments = {"ring": ring, "ulysses": ulysses, "rotate_method": method, "backend": backend}
    check(pool.run(ring * ulysses, compare, **arguments, **options))


def settings_seen(meshes, orders_agree):
    """Inductor's settings, by a PyTorch before or after `orders_agree`: while the forward and the backward of a graph
    with an exchange are compiled, then of one without, and afterwards."""
    from torch._inductor import config

    group = meshes(2, 1).ring
    seen = []

    def look(graph, inputs):
        seen.append((config.comprehensive_padding, config.pre_grad_custom_pass is not None))
        return make_boxed_func(graph)

    def send(tensor):
        return tensor.sin() + collectives.wait(collectives.start_gather_others(tensor.detach(), (3, 3), group), group)

    torch._dynamo.reset()
    real = inductor.ORDERS_AGREE
    try:
        inductor.ORDERS_AGREE = Version(orders_agree)
        with config.patch(comprehensive_padding=True):
            for function in (send, torch.sin):
                tensor = torch.ones(3, 2, requires_grad=True)
                out = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look))(tensor)
                out.sum().backward()
            look(torch.nn.Identity(), ())
    finally:
        inductor.ORDERS_AGREE = real
    return seen


def test_settings_hold_for_graphs_with_exchanges_alone(pool):
    """Gradients that the gaps would give on a GPU are tested with Wan, by `tests/gpu/test_context_parallel.py`."""
    usual = (True, False)
    assert pool.run(2, settings_seen, orders_agree="99") == [[(False, True)] * 2 + [usual] * 3] * 2
    assert pool.run(2, settings_seen, orders_agree="2.0") == [[(True, True)] + [usual] * 4] * 2
