"""Whatever users do to a pipeline, in any order, it computes what a plain pipeline computes after each of these steps;
or a step is refused, on all ranks alike, and changes nothing."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from .undo import CHANGES, OURS, SCOPED, begin, end, live

TOLERANCE = 1e-5
"""for float32; differences that the steps could make are 1e-2 and more"""


def machine(pool: Any) -> type[RuleBasedStateMachine]:
    class Life(RuleBasedStateMachine):
        @initialize()
        def build(self) -> None:
            pool.run(2, begin)

        @rule(step=st.sampled_from([*CHANGES, *OURS, SCOPED]))
        def do(self, step: str) -> None:
            outcomes = pool.run(2, live, step=step)
            assert outcomes[0][0] == outcomes[1][0]
            hypothesis.event(f"{step}: {outcomes[0][0][:40]}")
            assert max(error for _, error in outcomes) < TOLERANCE

        def teardown(self) -> None:
            pool.run(2, end)

    return Life


def drive(pool: Any, examples: int, steps: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(lambda: machine(pool)(), settings=settings)


@pytest.mark.slow
def test_a_few_lives(pool: Any) -> None:
    drive(pool, 2, 12)


@pytest.mark.thorough
def test_many_lives(pool: Any) -> None:
    drive(pool, 60, 40)


LONG = """
enable Ulysses; load an adapter; fuse; provider math; unfuse; disable; enable a ring; load another; set both; scope;
to float32; processor; to float64; delete one; disable; fuse projections; unfuse projections; enable a gather; unload;
disable; no provider; offload the model; enable Ulysses; remove hooks; disable; save and reload; compile blocks;
enable a ring; load an adapter; disable; unload; save and reload; diffusers' processor; compile repeated blocks;
enable Ulysses; load an adapter; switch adapters off; switch adapters on; set one; disable; unload; save and reload;
offload groups; enable a gather; disable; no CUDA graphs
"""


@pytest.mark.slow
def test_a_long_life_in_which_nothing_is_refused(pool: Any) -> None:
    """So that the lives above are not made of refusals."""
    pool.run(2, begin)
    outcomes = {}
    for step in " ".join(LONG.split()).split("; "):
        outcomes[step] = pool.run(2, live, step=step)
    pool.run(2, end)
    assert {step: each for step, each in outcomes.items() if each[0][0] != "done" or each[0][1] > TOLERANCE} == {}
