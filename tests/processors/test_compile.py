"""A bound model compiles as it did: in one graph, forward and backward, with the provider's kernel in it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import DispatchProcessor, attention_provider, set_attention_provider
from diffusers_attn.processors.binding import attention_modules_of

from ..marks import thorough_but
from ..zoo import CASES, outputs, relative_change

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MATH, SDPA = "_scaled_dot_product_attention_math", "scaled_dot_product_attention"


@pytest.fixture
def counter():
    return CompileCounterWithBackend("eager")


def attention_in(graph):
    """The attention functions in a graph, in order."""
    names = [getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes]
    return [MATH if MATH in name else SDPA for name in names if SDPA in name]


# Both entry points, with and without masks, and a hard-coded backend.
@pytest.mark.parametrize(
    "name",
    thorough_but(
        ["flux", "wan", "qwenimage"],
        ["flux", "wan", "wan_i2v", "sd3", "sdxl_masked", "qwenimage", "flux2", "kandinsky6_sr"],
    ),
)
@torch.no_grad()
def test_one_graph(name, counter):
    case = CASES[name]
    model = case.build()
    expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("_native_math"))
    found = torch.compile(model, backend=counter, fullgraph=True)(**case.inputs())
    assert counter.frame_count == 1
    assert relative_change(found, expected) < 1e-5


@pytest.mark.parametrize("name", thorough_but(["wan"], ["flux", "wan"]))
def test_one_graph_forward_and_backward_and_two_providers_in_it(name):
    case = CASES[name]
    model = case.build()
    counter = CompileCounterWithBackend("aot_eager")

    def gradients(callable_model):
        model.zero_grad()
        sum(tensor.square().mean() for tensor in outputs(callable_model(**case.inputs()))).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(model)
    for index, (_, module) in enumerate(attention_modules_of(model)):
        module.set_processor(DispatchProcessor(("native", "_native_math")[index % 2]))
    found = gradients(torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert attention_in(counter.graphs[0]) == [SDPA, MATH] * 2
    assert all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6) for ours, theirs in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_change_of_provider_is_noticed(counter):
    case = CASES["flux"]
    model = case.build()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = compiled(**case.inputs())
    set_attention_provider(model, "_native_math")
    assert relative_change(compiled(**case.inputs()), expected) < 1e-5
    set_attention_provider(compiled, "native")
    assert relative_change(compiled(**case.inputs()), expected) < 1e-5
    assert [set(attention_in(graph)) for graph in counter.graphs] == [{SDPA}, {MATH}, {SDPA}]
    for provider in ("_native_math", "native", None):
        set_attention_provider(model, provider)
        assert relative_change(compiled(**case.inputs()), expected) < 1e-5
    assert counter.frame_count == 3  # each of these has a graph already


@pytest.mark.slow
@torch.no_grad()
def test_a_change_of_scope_is_noticed(counter):
    case = CASES["sd3"]
    model = case.build()
    model.set_attn_processor(DispatchProcessor())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = compiled(**case.inputs())
    with attention_provider("_native_math"):
        assert relative_change(compiled(**case.inputs()), expected) < 1e-5
    assert [set(attention_in(graph)) for graph in counter.graphs] == [{SDPA}, {MATH}]


@torch.no_grad()
def test_repeated_blocks():
    """Compiled block by block: as many graphs as without us, one for all blocks of a kind and layout."""
    case = CASES["flux"]
    graphs = []
    for bound in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model = case.build()
        expected = model(**case.inputs())
        if bound:
            model.set_attn_processor(DispatchProcessor("_native_math"))
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert relative_change(model(**case.inputs()), expected) < 1e-5
        graphs.append([attention_in(graph) for graph in counter.graphs])
    assert graphs == [[[SDPA]] * 3, [[MATH]] * 3]


@torch.no_grad()
def test_under_a_default_device(counter):
    case = CASES["sd3"]
    model = case.build()
    expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("_native_math"))
    with torch.device("cpu"):
        found = torch.compile(model, backend=counter, fullgraph=True)(**case.inputs())
    assert counter.frame_count == 1
    assert set(attention_in(counter.graphs[0])) == {MATH}
    assert relative_change(found, expected) < 1e-5


@pytest.mark.slow
def test_with_inductor():
    case = CASES["flux"]
    model = case.build()
    with torch.no_grad():
        expected = model(**case.inputs())
    model.set_attn_processor(DispatchProcessor("native"))
    model.single_transformer_blocks[0].compile(fullgraph=True)
    result = model(**case.inputs()).sample
    result.square().mean().backward()
    assert relative_change(result.detach(), expected) < 1e-5
    assert model.single_transformer_blocks[0].attn.to_q.weight.grad.norm() > 0
