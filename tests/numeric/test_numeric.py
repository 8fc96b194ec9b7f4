"""A sample of the numeric matrix has the outcomes that docs/trust.md shows. All of it: `make test-thorough`."""

from __future__ import annotations

import random

import pytest
import torch

from diffusers_attn import attention_dispatch
from diffusers_attn.providers.registry import provider_status

from . import over_ranks
from .cell import FAULT, REFUSED, Outcome, named, outcome, reason_of
from .outcomes import FOLDER, OPEN, read
from .statements import NONE
from .workers import Cell, cells_of

PROVIDERS = ("auto", "native", "_native_math", "flex")
"""Those that run on a CPU."""
STRATEGIES = (NONE, *over_ranks.STRATEGIES)
CELLS = cells_of(PROVIDERS, STRATEGIES, "cpu")
COMPILED = 8
EAGER = 120
"""Cells of the sample, by what they cost: 20 s in all."""


def _sample() -> set[Cell]:
    choose = random.Random(0)
    compiled = [cell for cell in CELLS if cell.name == "compiled"]
    eager = [cell for cell in CELLS if cell.name != "compiled"]
    return {*choose.sample(compiled, COMPILED), *choose.sample(eager, EAGER)}


SAMPLE = _sample()


def kind(found: Outcome) -> str:
    """What must not change. `named` has compared the words of a refusal with the provider's statements."""
    return found.partition(":")[0] if isinstance(found, str) else "served"


def groups():
    for which, marks in (("sample", ()), ("all", pytest.mark.thorough)):
        for provider in PROVIDERS:
            for strategy in STRATEGIES:
                cells = [cell for cell in CELLS if cell[:2] == (provider, strategy)]
                cells = [cell for cell in cells if which == "all" or cell in SAMPLE]
                if cells:
                    yield pytest.param(cells, marks=marks, id=f"{which}-{provider}-{strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("cells", groups())
def test_cells(pool, cells):
    provider, strategy, *_ = cells[0]
    if strategy == NONE:
        found = [outcome(provider, cell.feature, cell.name, torch.device("cpu")) for cell in cells]
    else:
        ring, ulysses = over_ranks.degrees_of(strategy, 0)
        given = [(cell.feature, cell.name) for cell in cells]
        answers = pool.run(
            ring * ulysses, over_ranks.outcomes, provider=provider, strategy=strategy, cells=given, gpus=0
        )
        found = over_ranks.together(answers)
    recorded = read(FOLDER / "cpu.json")["cells"][provider][strategy]
    for cell, each in zip(cells, found):
        assert kind(each) == kind(recorded[cell.feature][cell.name]), cell


def test_every_cell_has_an_outcome():
    recorded = read(FOLDER / "cpu.json")["cells"]
    assert set(CELLS) == {
        Cell(provider, strategy, feature, name)
        for provider, strategies in recorded.items()
        for strategy, features in strategies.items()
        for feature, passes in features.items()
        for name in passes
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_no_outcome_is_a_fault_that_nobody_knows(path):
    faults = {
        (path.stem, provider, strategy, feature, name)
        for provider, strategies in read(path)["cells"].items()
        for strategy, features in strategies.items()
        for feature, passes in features.items()
        for name, found in passes.items()
        if str(found).startswith(FAULT)
    }
    assert faults == {cell for cell in OPEN if cell[0] == path.stem}


def test_all_providers_of_the_cpu_are_here():
    assert all(provider_status(name).available for name in PROVIDERS)


QUERY = torch.randn(1, 2, 5, 8)


def refused_at_once():
    return attention_dispatch(QUERY, QUERY, QUERY, dropout_p=2.0)


def refused_late():
    attention_dispatch(QUERY, QUERY, QUERY)
    return refused_at_once()


@pytest.mark.parametrize(
    ("compute", "refused", "expected"),
    [
        (lambda: ({"out": 1e-9}, {"out": 1e-8}), [], {"out": 1e-9}),
        (lambda: ({"out": 1e-7}, {"out": 1e-8}), [], f"{FAULT}out is off by 1.00e-07"),
        (lambda: ({"out": float("nan")}, {"out": 1e-8}), [], f"{FAULT}out is off by nan"),
        (lambda: ({"out": 0.0}, {"out": 1e-8}), ["no mask"], f"{FAULT}computed, although its statements say: no mask"),
        (refused_at_once, ["a probability"], REFUSED),
        (refused_at_once, ["no backward"], f"{FAULT}refused with another error"),
        (refused_at_once, [], f"{FAULT}refused with another error"),
        (refused_late, ["a probability"], f"{FAULT}aten._scaled_dot_product_flash_attention_for_cpu.default ran"),
        (lambda: 1 / 0, ["a probability"], f"{FAULT}ZeroDivisionError"),
    ],
)  # fmt: skip
def test_outcomes_are_named(compute, refused, expected):
    found = named(compute, refused)
    assert found == expected if isinstance(expected, dict) else found.startswith(expected)


def test_a_reason_does_not_repeat_the_call():
    assert named(refused_at_once, ["a probability"]).endswith("a probability from 0 to 1 is accepted.")
    refusal = "attention provider 'flex' cannot serve this call: it has no dropout. The call: float32. Providers"
    assert reason_of(refusal) == "it has no dropout"
