"""Graphs of a split model and of others: each runs where it belongs, and only those of the split model are dropped."""

import copy
import gc
import inspect
import pickle
import types
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusers_attn import CPInput, ParamId, apply_context_parallel, remove_context_parallel
from diffusers_attn.context_parallel.compile import own_forward
from diffusers_attn.context_parallel.compile.own_forward import is_replaced
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.runtime.cuda_graphs.obstacles import of_model

MESH = ContextParallelMesh(ContextParallelConfig(3, 1), Group("first of three", 0, 3), ALONE)
PLAN = {"blocks.0.inner": {ParamId("x"): CPInput(0)}}  # of 6 tokens, this rank keeps the first 2
TOKENS = torch.arange(6.0)[:, None]


class Inner(nn.Module):
    def forward(self, x):
        return x + 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x * 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Other(Model):
    def forward(self, x):
        return -super().forward(x)


def by_blocks(model, counter):
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    return model


def as_one_graph(model, counter):
    model.compile(backend=counter, fullgraph=True)
    return model


def in_a_function(model, counter):
    def call(x):
        return model(x)

    call.__code__ = call.__code__.replace()  # as two functions of a user have two
    return torch.compile(call, backend=counter, fullgraph=True)


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [by_blocks, as_one_graph, in_a_function])
@pytest.mark.parametrize("cls", [Model, Other])
def test_other_models_keep_their_graphs(how, cls):
    counters = CompileCounter(), CompileCounter()
    split, other = how(model := Model(), counters[0]), how(cls(), counters[1])
    expected = TOKENS * 4 + 3
    assert torch.equal(split(TOKENS), expected) and torch.equal(other(TOKENS).abs(), expected)
    before = counters[1].frame_count
    for _ in range(2):
        apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
        assert torch.equal(split(TOKENS), expected[:2])
        assert torch.equal(other(TOKENS).abs(), expected)
        remove_context_parallel(model)
        assert torch.equal(split(TOKENS), expected)
        assert torch.equal(other(TOKENS).abs(), expected)
    again = 2 if how is as_one_graph and cls is Model else 0  # both models compile the forward of their class
    assert counters[1].frame_count <= before + again


def test_a_graph_of_another_model_does_not_run_in_a_split_one():
    """The other model's graph is first, and has no hooks."""
    counter = CompileCounter()
    model, other = by_blocks(Model(), counter), by_blocks(Model(), counter)
    apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
    assert len(other(TOKENS)) == 6 and len(model(TOKENS)) == 2 and len(other(TOKENS)) == 6


@pytest.mark.parametrize("how", [by_blocks, as_one_graph, in_a_function])
def test_a_model_may_be_split_often(how):
    """Dynamo refuses to compile one function more often than `recompile_limit`."""
    call = how(model := Model(), CompileCounter())
    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(4):
            apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
            assert len(call(TOKENS)) == 2
            remove_context_parallel(model)
            assert len(call(TOKENS)) == 6


def test_a_model_may_be_freed_while_another_is_compiled():
    """A garbage collection may run at any time. Dynamo would then use graphs that were dropped."""
    models = [by_blocks(Model(), CompileCounter())]
    models[0](TOKENS)
    apply_context_parallel(models[0], MESH, PLAN).strict = False  # it has no attention
    models[0](TOKENS)

    waiting = []

    def backend(graph, inputs):
        models.clear()
        gc.collect()
        waiting.append(len(own_forward._codes_to_drop))
        return graph.forward

    other = by_blocks(Model(), backend)
    apply_context_parallel(other, MESH, PLAN).strict = False
    assert len(other(TOKENS)) == 2
    remove_context_parallel(other)
    assert len(other(TOKENS)) == 6
    assert waiting[0] > 0 and not own_forward._codes_to_drop


def replace(module):
    """What offloading does."""
    forward = module.forward
    module.forward = types.MethodType(lambda self, x: forward(x), module)
    return forward


@pytest.mark.parametrize("order", ["outer", "inner", "lost"])
def test_beside_another_tool_that_replaces_forward(order):
    model = by_blocks(Model(), CompileCounter())
    inner = model.blocks[0].inner
    if order != "outer":
        before = replace(inner)
    model(TOKENS)
    apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
    if order == "outer":
        before = replace(inner)
    elif order == "lost":
        inner.forward = before
    assert len(model(TOKENS)) == 2
    remove_context_parallel(model)
    assert len(model(TOKENS)) == 6
    inner.forward = before
    assert len(model(TOKENS)) == 6


def test_what_others_see():
    apply_context_parallel(Model(), MESH, PLAN)  # imports diffusers, whose warnings may keep the frames of the import
    model = Model()
    apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
    inner = model.blocks[0].inner
    assert str(inspect.signature(inner.forward)) == "(x)"
    assert not is_replaced(inner)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("forward" in vars(each) for each in copied.modules())
    freed = weakref.ref(inner)
    del model, inner
    assert freed() is None
    model = Model()
    replace(model.blocks[0].inner)
    apply_context_parallel(model, MESH, PLAN).strict = False  # it has no attention
    assert is_replaced(model.blocks[0].inner)
    remove_context_parallel(model)
    assert is_replaced(model.blocks[0].inner) and "forward" not in vars(model.blocks[0])


def test_cuda_graphs_may_record_a_split_model():
    model = Model()
    apply_context_parallel(model, MESH, PLAN)
    assert "forward" not in str(of_model(model))
    replace(model.blocks[0].inner)
    assert "forward of 'blocks.0.inner'" in str(of_model(model))
