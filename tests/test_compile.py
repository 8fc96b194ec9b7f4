"""One graph, forward and backward; a change of provider is noticed."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import attention_dispatch, attention_provider
from diffusers_attn.dispatch import attend
from diffusers_attn.scope import ProviderChoice

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def layer(query, key, value, mask=None):
    return attend(query * 2, key, value, mask, layout="bshd").sin()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def inputs(query_len=7, key_len=9):
    shapes = (2, query_len, 4, 16), (2, key_len, 4, 16), (2, key_len, 4, 16)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


MASKS = {
    "none": None,
    "key": torch.rand(2, 1, 1, 9) > 0.3,
    "dense": torch.rand(7, 9) > 0.3,
    "bias": torch.randn(2, 4, 7, 9),
}


@pytest.mark.parametrize("mask", MASKS)
def test_one_graph_per_provider_and_the_same_numbers(counter, mask):
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    tensors = inputs()
    for graphs, provider in enumerate(["native", "_native_math", "auto", "native"], start=1):
        with attention_provider(provider):
            expected, found = layer(*tensors, MASKS[mask]), compiled(*tensors, MASKS[mask])
        assert torch.equal(found, expected)
        for ours, theirs in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (found, expected))):
            assert torch.allclose(ours, theirs, atol=1e-6)
        assert counter.frame_count == min(graphs, 3)  # the last one is the first again


@pytest.mark.parametrize("mask", MASKS)
def test_flex_in_one_graph(counter, mask):
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    tensors = inputs()
    with attention_provider("flex"), torch.no_grad():
        assert torch.allclose(compiled(*tensors, MASKS[mask]), layer(*tensors, MASKS[mask]), atol=1e-5)
    assert counter.frame_count == 1


def test_lengths_may_stay_dynamic(counter):
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(*inputs(11, 23))
        graphs = counter.frame_count
        for lengths in ((12, 25), (13, 31), (17, 64)):
            tensors = inputs(*lengths)
            assert torch.allclose(compiled(*tensors), layer(*tensors), atol=1e-6)
    assert counter.frame_count == graphs


def test_a_bound_choice_is_part_of_the_graph(counter):
    choices = [ProviderChoice.of("native"), ProviderChoice.of("_native_math")]

    def both(query, key, value):
        return sum(attend(query, key, value, layout="bshd", bound=choice) for choice in choices)

    tensors = inputs()
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    assert torch.allclose(compiled(*tensors), 2 * attend(*tensors, layout="bshd"), atol=1e-6)
    assert counter.frame_count == 1


def test_with_inductor():
    compiled = torch.compile(attention_dispatch, fullgraph=True)
    query, key, value = torch.randn(3, 1, 2, 16, 8, requires_grad=True)
    for provider in ("native", "_native_math"):
        with attention_provider(provider):
            assert torch.allclose(compiled(query, key, value), attention_dispatch(query, key, value), atol=1e-5)


def test_lowerings_are_in_the_graph(counter):
    """Causal with a mask, grouped heads, unequal lengths: none of it breaks the graph."""

    def call(query, key, value, mask):
        return attend(query, key, value, mask, is_causal=True, enable_gqa=True, layout="bshd")

    query, key = torch.randn(1, 9, 4, 8), torch.randn(1, 6, 2, 8)
    mask = MASKS["key"][:1, ..., :6]
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for provider in ("native", "_native_math", "flex"):
        with attention_provider(provider), torch.no_grad():
            assert torch.allclose(compiled(query, key, key, mask), call(query, key, key, mask), atol=1e-5)
    assert counter.frame_count == 3


def test_an_error_names_the_reason(counter):
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with attention_provider("flex"), pytest.raises(Exception, match="no backward on cpu.*native"):
        compiled(*inputs())
