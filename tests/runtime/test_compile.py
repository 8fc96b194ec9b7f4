"""apply_compile: models and their blocks as graphs, with gradients, checkpointing and plans put on before and after."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_attn import AttentionProviderError, apply_compile
from diffusers_attn.runtime.compile import repeated_blocks
from tests.zoo import CASES, outputs

from ..marks import thorough_but

BLOCKS = {
    "flux": {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2},
    "wan": {"WanTransformerBlock": 2},
    "cogvideox": {"CogVideoXBlock": 2},  # these name no repeated blocks
    "cogview4": {"CogView4TransformerBlock": 2},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found(name):
    names = [type(block).__name__ for block in repeated_blocks(CASES[name].build())]
    assert {each: names.count(each) for each in names} == BLOCKS[name]


def run(model, name):
    """Output and gradients."""
    (out,) = outputs(model(**CASES[name].inputs()))
    parameters = list(model.parameters())
    grads = torch.autograd.grad(out.square().mean(), parameters, allow_unused=True)
    return torch.cat([out.flatten(), *(grad.flatten() for grad in grads if grad is not None)]).detach()


# Blocks that the class names, blocks that it does not name, and a whole model.
@pytest.mark.parametrize(
    ("name", "scope", "graphs", "checkpointing"),
    thorough_but(
        [("wan", "regional", 1, True), ("cogview4", "regional", 1, False), ("flux", "full", 1, False)],
        [
            (*case, checkpointing)
            for case in (("wan", "regional", 1), ("cogview4", "regional", 1), ("flux", "full", 1))
            for checkpointing in (False, True)
        ],
    ),
)
def test_training(name, scope, graphs, checkpointing, fresh_compiler):
    model = CASES[name].build().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    expected = run(model, name)
    counter = CompileCounterWithBackend("aot_eager")
    assert apply_compile(model, scope, backend=counter) is model
    found = run(model, name)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert 1 <= counter.frame_count <= graphs


def test_a_part_that_does_not_compile_is_an_error_unless_that_is_asked_for(fresh_compiler):
    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(AttentionProviderError, match=r"Breaks cannot be .* one graph: .*\(model, fullgraph=False\)"):
        apply_compile(Breaks(), "full", backend="eager")(torch.ones(2))
    assert apply_compile(Breaks(), "full", backend="eager", fullgraph=False)(torch.ones(1)) == 2


def test_refused():
    model = CASES["wan"].build()
    with pytest.raises(AttentionProviderError, match="compile_scope='blocks': accepted are 'regional'"):
        apply_compile(model, "blocks")
    with pytest.raises(AttentionProviderError, match="pipe.transformer"):
        apply_compile(object())
    with pytest.raises(AttentionProviderError, match="Linear has no repeated blocks.*compile_scope='full'"):
        apply_compile(nn.Linear(2, 2))
