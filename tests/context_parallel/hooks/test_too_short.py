"""The error for a dimension that is too short to split, when another dimension is the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_attn import (
    AttentionProviderError,
    CPInput,
    CPOutput,
    ParamId,
    attention_provider,
    set_attention_provider,
)
from diffusers_attn.context_parallel.config import ContextParallelConfig
from diffusers_attn.context_parallel.hooks.apply import apply_context_parallel
from diffusers_attn.context_parallel.mesh import ALONE, ContextParallelMesh, Group
from diffusers_attn.cp_plans import advanced
from tests.zoo import CASES

# The plan of finetrainers for Wan, whose rotary values were one tensor, [batch, 1, seq, channels].
OLD_PLAN = {
    "rope": {ParamId(index=0): CPInput(2, 4, split_output=True)},
    "blocks.*": {ParamId("encoder_hidden_states", 1): CPInput(1, 3)},
    "blocks.0": {ParamId("hidden_states", 0): CPInput(1, 3)},
    "proj_out": [CPOutput(1, 3)],
}


def mesh(rank: int, size: int) -> ContextParallelMesh:
    return ContextParallelMesh(ContextParallelConfig(size), Group("none", rank, size), ALONE)


class Recorder(nn.Module):
    def forward(self, tokens, rotary=None, length=None):
        return tokens, rotary


def refusals(plan, *tensors, size=2, length=None, forward=None, compiled=False) -> set[str]:
    """What each of `size` ranks raises."""
    messages = set()
    for rank in range(size):
        module = forward() if forward else Recorder()
        apply_context_parallel(module, mesh(rank, size), plan)
        run = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
        with pytest.raises(AttentionProviderError) as error:
            run(*tensors, length=length) if length else run(*tensors)
        messages.add(str(error.value))
    return messages


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_plan_of_wan_before_its_rotary_values_changed(ranks):
    case = CASES["wan"]
    messages = set()
    for rank in range(ranks):  # no rank reaches an exchange
        model = case.build()
        apply_context_parallel(model, mesh(rank, ranks), OLD_PLAN)
        with pytest.raises(AttentionProviderError) as error:
            model(**case.inputs())
        messages.add(str(error.value))
    (message,) = messages
    assert (
        f"output number 0 of 'rope' along dimension 2, which has 1 entry for {ranks} ranks: its shape is [1, "
        in message
    )
    assert "fits: CPInput(1, 4, split_output=True). The module also gives output number 1 of this shape" in message


def test_what_it_advises_is_right(pool):
    case = CASES["wan"]
    with torch.no_grad():
        expected = case.build()(**case.inputs()).sample
    for found in pool.run(2, advised, advice=[CPInput(1, 4, split_output=True)] * 2):
        assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def advised(meshes, advice):
    case = CASES["wan"]
    model = case.build()
    plan = OLD_PLAN | {"rope": {ParamId(index=number): spec for number, spec in enumerate(advice)}}
    set_attention_provider(model, "native")
    apply_context_parallel(model, meshes.lines[2], plan)
    with attention_provider("native", mesh=meshes.lines[2]):
        return model(**case.inputs()).sample


@pytest.mark.parametrize("compiled", [False, True])
def test_of_an_argument_nested_too(compiled, fresh_compiler):
    plan = {"": {"rotary": CPInput(2, 4)}}
    (message,) = refusals(plan, torch.ones(1, 6), (torch.ones(2, 6, 1, 8),) * 2, compiled=compiled)
    assert "rotary[0] of '' along dimension 2, which has 1 entry for 2 ranks: its shape is [2, 6, 1, 8]" in message
    assert "Dimension 1, with 6 entries, fits: CPInput(1, 4)." in message


def test_the_length_of_a_named_sequence_is_known():
    plan = {"": {"tokens": CPInput(1, 2, sequence="video"), "rotary": CPInput(-1, 3, sequence="video")}}
    (message,) = refusals(plan, torch.ones(1, 9), torch.ones(9, 16, 3), size=4)
    assert "along dimension 2, which has 3 entries for 4 ranks, and 'video' has 9: its shape is [9, 16, 3]" in message
    assert "Dimension 0, with 9 entries, fits: CPInput(0, 3, sequence='video')" in message
    plan = {"": {"length": advanced.CPLength("video", of=int), "tokens": CPInput(1, 2, sequence="video")}}
    (message,) = refusals(plan, torch.ones(1, 1), None, length=8)
    assert "and 'video' has 8: its shape is [1, 1]. None of its dimensions can be split over 2 ranks" in message


def test_a_dimension_that_is_not_there():
    (message,) = refusals({"": {"tokens": CPInput(2)}}, torch.ones(1, 9))
    assert (
        "along dimension 2, and it has 2 dimensions: its shape is [1, 9]. Dimension 1, with 9 entries, fits" in message
    )


def test_a_sequence_of_one():
    (message,) = refusals({"": {"tokens": CPInput(1)}}, torch.ones(1, 1, 8))
    assert message.endswith("None of its dimensions can be split over 2 ranks: use fewer, or a longer sequence.")


@pytest.mark.parametrize(
    "plan, tokens, rotary",
    [
        ({"tokens": CPInput(1, sequence="text")}, torch.ones(1, 2), None),  # two for three ranks
        ({"tokens": CPInput(1, sequence="text")}, torch.ones(1, 1, 4), None),
        ({"tokens": CPInput(1, sequence="text"), "rotary": CPInput(1, 2, sequence="text", leave_other_dims=True)},
         torch.ones(1, 9), torch.ones(1, 1)),
    ],
)  # fmt: skip
def test_short_sequences_that_are_meant(plan, tokens, rotary):
    for rank in range(3):
        module = Recorder()
        apply_context_parallel(module, mesh(rank, 3), {"": plan})
        module(tokens, rotary)


def test_one_rank_splits_nothing():
    module = Recorder()
    apply_context_parallel(
        module, ContextParallelMesh(ContextParallelConfig(), ALONE, ALONE), {"": {"tokens": CPInput(1)}}
    )
    assert module(torch.ones(1, 1))[0].shape == (1, 1)
