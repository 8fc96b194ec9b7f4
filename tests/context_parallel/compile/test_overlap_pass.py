"""Compiled: keys and values are sent before what does not need them, and what is not known to be safe stays.

One process stands for one of two ranks here: the other never sends, so that what is received is whatever was there.
"""

import pickle
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import dropout, linear

from diffusers_attn.context_parallel.attention import allgather_kv_one_call
from diffusers_attn.context_parallel.attention.block_attention import BlockAttention
from diffusers_attn.context_parallel.attention.parallel_attention import parallel_attention
from diffusers_attn.context_parallel.attention.partial_kernel import PartialKernel
from diffusers_attn.context_parallel.comm.symmetric_gather import SymmetricGather, open_gather
from diffusers_attn.context_parallel.comm.transport import SYMMETRIC
from diffusers_attn.context_parallel.compile import overlap_pass
from diffusers_attn.context_parallel.compile.inductor import _make_pass
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.context_parallel.sequences.sharding import Shards

from ..shared_memory import NoLane

TOKENS, HEADS, WIDTH = 6, 2, 32
SHARDS = Shards.contiguous(2 * TOKENS, 2)


class Halves:
    """Memory of two ranks, of which this process is the first."""

    def __init__(self, nbytes):
        self.buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]

    def barrier(self, channel):
        pass


@pytest.fixture
def attention(monkeypatch):
    """Of queries, keys and values of `[batch, tokens, width]`, in one call or two."""
    group = Group("test_early", 0, 2)
    gather = open_gather(group, lambda: SymmetricGather(group, Halves, NoLane(), NoLane()))

    def attend(query, key, value, method="allgather"):
        mesh = ContextParallelMesh(ContextParallelConfig(2, 1, method), group, ALONE)
        heads = [tensor.unflatten(-1, (HEADS, -1)) for tensor in (query, key, value)]
        out = parallel_attention(*heads, mesh=mesh, query_shards=SHARDS, key_shards=SHARDS, transport=SYMMETRIC)
        return out.flatten(2)

    torch._dynamo.reset()
    yield attend
    torch._dynamo.reset()
    del gather


@pytest.fixture(params=["one call", "two calls"])
def calls(request, monkeypatch):
    monkeypatch.setattr(
        allgather_kv_one_call, "SECONDS_OF_A_SECOND_CALL", float("inf") if request.param == "one call" else 0.0
    )
    return request.param


def weights(*names):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=generator) / 6 for _ in names]


def traced(function, *inputs):
    """The graph of `function` as Dynamo gives it, with its inputs in its order, and what the function gives."""
    found = []

    def keep(graph_module, example_inputs):
        found.append((graph_module, example_inputs))
        return graph_module.forward

    out = torch.compile(function, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    ((graph_module, example_inputs),) = found
    return graph_module, example_inputs, out


def order(graph):
    """Its calls by their names, with `names` of weights in place of the products in which they are."""
    found = []
    for node in graph.nodes:
        name = overlap_pass._name(node) if node.op.startswith("call_") else ""
        if name == "linear":
            found.append(str(node.args[1]).strip("l_"))
        elif name in (
            "symmetric_gather_start",
            "symmetric_gather_finish",
            "_scaled_dot_product_flash_attention_for_cpu",
        ):
            found.append({"symmetric_gather_start": "send", "symmetric_gather_finish": "await"}.get(name, "attend"))
    return found


def moved(function, *inputs):
    """The order of calls before and after; that both compute the same is looked at here."""
    with torch.no_grad():
        graph_module, example_inputs, expected = traced(function, *inputs)
        before = order(graph_module.graph)
        overlap_pass.start_exchanges_early(graph_module.graph)
        graph_module.graph.lint()
        assert_tied(graph_module.graph)
        graph_module.recompile()
        (found,) = graph_module(*example_inputs)
    assert torch.equal(found, expected)
    return before, order(graph_module.graph)


def assert_tied(graph):
    """Each exchange depends on all attention before it, by its arguments."""
    nodes = list(graph.nodes)
    for start in overlap_pass._calls(graph, "symmetric_gather_start"):
        before = [
            node for node in nodes[: nodes.index(start)] if overlap_pass._name(node).endswith("attention_for_cpu")
        ]
        assert set(before) <= overlap_pass._ancestors(start.args[overlap_pass.TENSORS], set(nodes))


def block(attention, change=None, method="allgather"):
    """Attention beside an MLP, as in the single blocks of Flux; and what `change` does between them."""

    def forward(x, q, k, v, m):
        x = x.sin()
        mlp = linear(x, m).relu()
        query, key, value = linear(x, q).cos(), linear(x, k), linear(x, v)
        if change is not None:
            mlp = change(mlp)
        return torch.cat([attention(query, key, value, method), mlp], dim=-1)

    return forward


INPUT = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_what_keys_do_not_need_comes_after(attention, calls):
    before, depends_on = moved(block(attention), INPUT, *weights("q", "k", "v", "m"))
    attend = ["await", "attend"] if calls == "one call" else ["attend", "await", "attend"]
    assert before == ["m", "q", "k", "v", "send", *attend]
    assert depends_on == ["k", "v", "send", "m", "q", *attend]


def test_a_ring_begins_early(attention, calls):
    """And one of two ranks, which is a gather, may await all keys as well."""
    _, depends_on = moved(block(attention, method="alltoall"), INPUT, *weights("q", "k", "v", "m"))
    assert depends_on[:5] == ["k", "v", "send", "m", "q"]
    assert depends_on.count("attend") == (1 if calls == "one call" else 2)


CHANGES = {
    "writes to it": lambda mlp: mlp.add_(1.0),
    "writes to a part": lambda mlp: mlp.__setitem__((0, 0), 1.0) or mlp,
    "draws": lambda mlp: mlp + torch.rand_like(mlp),
    "drops": lambda mlp: dropout(mlp, 0.5, training=True),
    "calls what nobody knows": lambda mlp: torch.ops.aten.add_.Tensor(mlp, 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_moved_past_what_does_more_than_compute(attention, change):
    with torch.no_grad():
        graph_module, *_ = traced(block(attention, CHANGES[change]), INPUT, *weights("q", "k", "v", "m"))
        before = [str(node) for node in graph_module.graph.nodes]
        overlap_pass.start_exchanges_early(graph_module.graph)
    depends_on = [str(node) for node in graph_module.graph.nodes]
    assert depends_on == before


def test_what_only_looks_random_is_moved(attention):
    _, depends_on = moved(block(attention, lambda mlp: dropout(mlp, 0.5, training=False)), INPUT, *weights(*"qkvm"))
    assert depends_on[:5] == ["k", "v", "send", "m", "q"]


def test_inputs_are_not_said_to_be_changed(attention):
    """A compiler would copy them back. Nothing else holds the products back, so that they stay where they are."""

    def forward(x, q, k, v):
        x = x.view(x.shape)
        return attention(linear(x, q), linear(x, k), linear(x, v))

    before, depends_on = moved(forward, INPUT, *weights("q", "k", "v"))
    assert depends_on == before


def test_without_products_nothing_is_moved(attention):
    def forward(x, k, v):
        x = x.sin()
        return attention(x.cos(), linear(x, k), linear(x, v))

    before, depends_on = moved(forward, INPUT, *weights("k", "v"))
    assert depends_on == before


def test_layers_follow_each_other(attention, calls):
    def layer(x, q, k, v, m):
        return linear(attention(linear(x, q), linear(x, k), linear(x, v)), m)

    def forward(x, q, k, v, m):
        x = layer(x.sin(), q, k, v, m).sin()
        return layer(x, q, k, v, m)

    _, depends_on = moved(forward, INPUT, *weights("q", "k", "v", "m"))
    attend = ["await", "attend"] if calls == "one call" else ["attend", "await", "attend"]
    assert depends_on == ["k", "v", "send", "q", *attend, "m"] * 2


def test_what_was_received_is_read_before_the_next_begins(attention, calls):
    """Here the second query alone sees to it: keys, and what its product reads, are there before the first exchange."""

    def forward(x, q, k, v, r):
        x = x.sin()
        key, value = linear(x, k), linear(x, v)
        first = attention(linear(x, q), key, value)
        return attention(linear(x, r) + first, key * 2, value + 1)

    _, depends_on = moved(forward, INPUT, *weights("q", "k", "v", "r"))
    attend = ["await", "attend"] if calls == "one call" else ["attend", "await", "attend"]
    assert depends_on == ["k", "v", "send", "q", *attend, "send", "r", *attend]


def test_attentions_that_do_not_depend_on_each_other_take_turns(attention, calls):
    def forward(x, q, k, v, r):
        x = x.sin()
        key, value = linear(x, k), linear(x, v)
        return attention(linear(x, q), key, value) + attention(linear(x, r), key * 2, value + 1)

    _, depends_on = moved(forward, INPUT, *weights("q", "k", "v", "r"))
    attend = ["await", "attend"] if calls == "one call" else ["attend", "await", "attend"]
    assert depends_on == ["k", "v", "send", "q", *attend, "send", "r", *attend]


def test_training_is_left_as_it_is(attention):
    """What is saved for a backward must not seem to change."""
    inputs = [INPUT.clone().requires_grad_(), *weights("q", "k", "v", "m")]
    graph_module, *_ = traced(block(attention), *inputs)
    before = [str(node) for node in graph_module.graph.nodes]
    overlap_pass.start_exchanges_early(graph_module.graph)
    assert [str(node) for node in graph_module.graph.nodes] == before


def test_inductor_keeps_the_order_and_copies_nothing(attention, calls):
    """By its own code: it runs the pass by itself, and would put both products with keys and queries in one kernel."""
    inputs = [INPUT, *weights("q", "k", "v", "m")]
    function = block(attention)
    expected = function(*inputs)
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        out, (code, *_) = run_and_get_code(compiled, *inputs)
    assert (out - expected)[:, :, WIDTH:].abs().max() < 1e-5
    launch = re.compile(r" +(?:buf\d+ = )?(extern_kernels|torch\.ops\.\w+)\.(\w+)[.\w]*\(")
    lines = [line for line in code.splitlines() if launch.match(line)]
    names = [launch.match(line)[2] for line in lines]
    attend = "_scaled_dot_product_flash_attention_for_cpu"
    assert names[:3] == ["mm", "mm", "symmetric_gather_start"] and names[-2:] == ["symmetric_gather_finish", attend]
    assert sorted(names[3:-2]) == sorted(["mm", "mm"] + ([] if calls == "one call" else [attend]))
    products = {re.search(r"out=(buf\d+)", line)[1] for line in lines[:2]}
    assert products <= set(re.findall(r"buf\d+", lines[2]))  # sent from where they were computed


def test_a_pass_that_is_there_already_runs_first():
    graph, ran = torch.fx.Graph(), []
    ours = _make_pass(ran.append)
    ours(graph)
    assert ran == [graph]
    assert ours.uuid() is None  # nothing is known of the other one
    alone = _make_pass(None)
    assert alone.uuid() is not None
    assert pickle.loads(pickle.dumps(alone)).uuid() == alone.uuid()
    assert _make_pass([alone, alone]).uuid() not in (None, alone.uuid())


SHAPES = {
    "Flux 1024² on two GPUs": (2, 4608, 24, True),
    "Flux 512² on four GPUs": (4, 1536, 24, True),
    "Flux 1024² on four GPUs": (4, 4608, 24, False),
    "Wan 1.3B 480p, 81 frames": (2, 32760, 12, False),
    "Wan 14B 480p, 81 frames": (2, 32760, 40, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_where_it_is_faster(shape):
    ranks, length, heads, expected = SHAPES[shape]
    shards = Shards.contiguous(length, ranks)
    call = BlockAttention(PartialKernel("native"), Group("", 0, ranks), shards, shards, transport=SYMMETRIC)
    query = torch.empty(1, length // ranks, heads, 128, dtype=torch.bfloat16, device="meta")
    assert allgather_kv_one_call.is_faster(query, query, query, call) is False  # nothing is computed beside it
    found = torch.compile(
        lambda: allgather_kv_one_call.is_faster(query, query, query, call), backend="eager", fullgraph=True
    )()
    assert found is expected
