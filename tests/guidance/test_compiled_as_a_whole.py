"""Guidance divided among groups of ranks around a transformer that its user compiled as a whole."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.guided_call import GuidedCall

from .families import build, draw

RANKS = 4
STEPS = 2
OURS = {"compile", "_call_impl"}
"""Attributes by which a call is replaced."""


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts their calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def one_block():
    """A pipeline whose transformer has one block: it is traced four times on each rank."""
    pipe = build("wan")
    pipe.transformer.blocks = pipe.transformer.blocks[:1]
    return pipe


def compiled(meshes):
    torch._dynamo.reset()
    pipe, graphs, errors = one_block(), Graphs(), {}
    model, expected = pipe.transformer, {scale: draw(one_block(), "wan", steps=STEPS, scale=scale) for scale in (1, 4)}

    def check(when, guided, scale=4):
        """The error of a call, and whether compiled graphs ran, and whether this rank computed half of the branches."""
        before, done = graphs.calls, guided and guided.computed
        found = draw(pipe, "wan", steps=STEPS, scale=scale)
        wrong = ((found - expected[scale]).abs().max() / expected[scale].abs().max()).item()
        errors[when] = wrong, graphs.calls > before, guided and guided.computed - done

    enable_context_parallel(pipe, verbose=False, guidance_degree=2)
    model.compile(backend=graphs)
    guided = model._compiled_call_impl
    assert isinstance(guided, GuidedCall)
    check("of the first call, whose outputs are not known", guided)
    check("compiled after", guided)
    assert not OURS & set(vars(copy.deepcopy(model)))
    disable_context_parallel(pipe)
    assert not OURS & set(vars(model)) and not isinstance(model._compiled_call_impl, GuidedCall)
    model._compiled_call_impl = None

    enable_context_parallel(pipe, verbose=False, guidance_degree=2)
    pipe.transformer = torch.compile(model, backend=graphs)
    check("without guidance", None, scale=1)
    torch._dynamo.reset()
    with pytest.raises(AttentionProviderError) as caught:
        draw(pipe, "wan", steps=STEPS)
    disable_context_parallel(pipe)
    assert not OURS & (set(vars(model)) | set(vars(pipe.transformer)))
    return errors, str(caught.value)


@pytest.mark.slow
def test_whole_models(pool):
    for errors, message in pool.run(RANKS, compiled):
        assert all(error < 1e-10 and ran for error, ran, _ in errors.values()), errors
        assert [calls for *_, calls in errors.values()] == [STEPS + 1, STEPS, None]
        assert "Call torch.compile before enable_context_parallel" in message
