"""torch.compile: one graph per provider, forward and backward, and the same numbers as without."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import attention_dispatch, attention_provider
from diffusers_attn.providers.catalog import SPECS

from .. import reference
from .cases import NAMED, exact_tolerance, provider_cases, providers

pytestmark = pytest.mark.gpu
INDUCTOR = {"native", "_native_cudnn", "flash", "flash_4", "flex", "sage", "xformers"}
"""compiled all the way; for the others the graph is what is looked at, which takes less long."""


def attend(query, key, value, mask):
    # Something for the compiler to do before and after.
    return attention_dispatch(query * 1.5, key, value, mask) + 1.0


@pytest.mark.parametrize(("provider", "case"), provider_cases(cases=[NAMED["bshd"], NAMED["padding"], NAMED["outer"]]))
def test_one_graph(provider, case, fresh_compiler, record):
    backend = CompileCounterWithBackend("inductor" if provider in INDUCTOR else "aot_eager")
    train = SPECS[provider].capabilities.backward
    inputs, mask = case.inputs(grad=train), case.make_mask()
    with attention_provider(provider):
        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        for _ in range(2):
            out = compiled(*inputs, mask)
        assert backend.frame_count == 1
        query, key, value = inputs
        expected, _ = reference.attention(query * 1.5, key, value, mask)
        error = reference.relative_error(out - 1.0, expected)
        # One rounding more: the sum with one.
        record(provider, "compiled output", error, exact_tolerance(provider, case.dtype) + 2e-2)
        if train:
            grad = torch.randn_like(expected)
            grads = torch.autograd.grad(out, inputs, grad.to(case.dtype))
            for ours, true in zip(grads, torch.autograd.grad(expected, inputs, grad)):
                record(provider, "compiled gradient", reference.relative_error(ours, true), 2e-2)


@pytest.mark.parametrize("provider", ["sage", "flash_4"])
def test_the_compilers_cuda_graphs(provider, fresh_compiler):
    """mode="reduce-overhead" captures what it can: sage's operator is tagged so that it is left out."""
    for param in providers():
        if param.values == (provider,) and param.marks:
            pytest.skip(param.marks[0].kwargs["reason"])
    compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
    with attention_provider(provider), torch.no_grad():
        for _ in range(4):
            query, key, value = NAMED["bf16"].inputs()
            out = compiled(query, key, value, None).clone()
            expected, _ = reference.attention(query * 1.5, key, value)
            assert reference.relative_error(out - 1.0, expected) < exact_tolerance(provider, out.dtype) + 2e-2
