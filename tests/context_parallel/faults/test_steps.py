"""A pipeline that one rank calls with another number of steps, or with other sizes: an error names the rank."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch.distributed as dist

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.context_parallel.comm import process_groups, rank_progress, shared_groups

from ...guidance.families import build, draw


def unlike(meshes: Any, inputs: str, **of_second: int) -> str:
    """The error of a call of which the second rank has other arguments; then a call of both."""
    rank_progress.GRACE = 1.0
    pipe, more = build("wan"), of_second if dist.get_rank() == 1 else {}
    enable_context_parallel(pipe, mesh=meshes.lines[2], inputs=inputs, verbose=False)
    for group in [group for group_set in shared_groups._all for group in group_set.groups]:
        process_groups.set_timeout(group, datetime.timedelta(seconds=3))
    found = "no error"
    try:
        draw(pipe, "wan", **{"steps": 3} | more)
    except AttentionProviderError as error:
        found = str(error)
    dist.barrier(meshes.lines[2].get_group())
    disable_context_parallel(pipe)
    return found


@pytest.mark.parametrize("inputs", ["broadcast", "check"])
def test_another_number_of_steps(pool: Any, inputs: str) -> None:
    first, second = pool.run(2, unlike, inputs=inputs, steps=2)
    if inputs == "check":  # in the first step, whose time is another one
        assert first == second and "timestep" in first and "on rank 1" in first
    else:
        assert "rank 1" in first and "was last at forward" in first and second == "no error"


@pytest.mark.parametrize("inputs", ["broadcast", "check"])
def test_another_size(pool: Any, inputs: str) -> None:
    first, second = pool.run(2, unlike, inputs=inputs, height=112)
    assert first == second and "hidden_states: [" in first and "on rank 1" in first
