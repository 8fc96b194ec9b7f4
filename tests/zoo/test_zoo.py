"""The zoo is what other tests compare outputs on: it must run, be reproducible, and not be blind to attention."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ..marks import thorough_but
from . import CASES, Case, Inputs, attention_sensitivity, outputs, relative_change

_ON_CPU = {"offset_grid_sizes"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In models of this size threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Models draw and build alike, so every third shows it; a new model is tried with `pytest -m '' tests/zoo -k NAME`.
@pytest.fixture(scope="module", params=thorough_but(list(CASES)[::3], CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case: Case) -> nn.Module:
    """The case's model, which no test changes."""
    return case.build()


@pytest.fixture(scope="module")
def reference(case: Case, model: nn.Module) -> Any:
    """Its output."""
    with torch.no_grad():
        return model(**case.inputs())


def test_output_is_finite_and_of_order_one(reference: Any) -> None:
    values = torch.cat([tensor.flatten() for tensor in outputs(reference)])
    assert values.isfinite().all()
    assert 0.1 < values.std() < 10
    assert values.abs().max() < 100


@torch.no_grad()
def test_seed_alone_determines_output(case: Case, reference: Any) -> None:
    """Neither is the global generator used, nor does it change."""
    state = torch.rand(1), torch.get_rng_state()
    again = case.build()(**case.inputs())
    assert torch.equal(torch.get_rng_state(), state[1])
    other = case.build(seed=1)(**case.inputs())
    assert all(torch.equal(*pair) for pair in zip(outputs(again), outputs(reference), strict=True))
    assert relative_change(other, reference) > 0.1


def test_output_depends_on_every_attention_call(case: Case, model: nn.Module) -> None:
    calls = attention_sensitivity(case, model)
    assert calls
    blind = {call.module for call in calls if min(call.zeroed, call.uniform) < 1e-4}
    for pattern in case.silent:
        excused = set(fnmatch.filter(blind, pattern))
        assert excused, f"no longer silent: {pattern}"
        blind -= excused
    assert not blind


@torch.no_grad()
def test_output_depends_on_every_mask(case: Case, model: nn.Module, reference: Any) -> None:
    for name in _masks(case.inputs()):
        inputs = case.inputs()
        holder = next(values for values in (inputs, *inputs.values()) if isinstance(values, dict) and name in values)
        holder[name] = torch.ones_like(holder[name])
        assert relative_change(model(**inputs), reference) > 1e-3, name


def _masks(inputs: Inputs) -> list[str]:
    """Names of all masks in the inputs, also of those in dictionaries for the attention processors."""
    layouts = {"img_mask"}  # says where image tokens stand, not what may be attended to
    names = [name for name, value in inputs.items() if "mask" in str(name) and isinstance(value, torch.Tensor)]
    names = [name for name in names if name not in layouts]
    return names + [name for value in inputs.values() if isinstance(value, dict) for name in _masks(value)]


@torch.no_grad()
def test_bfloat16_agrees_with_float32(case: Case, reference: Any) -> None:
    if case.only_float32:
        pytest.skip(case.only_float32)
    low = case.build(dtype=torch.bfloat16)(**case.inputs(dtype=torch.bfloat16))
    assert relative_change(low, reference) < 0.1


def test_inputs_go_to_the_device(case: Case) -> None:
    tensors = outputs({name: value for name, value in case.inputs(device="meta").items() if name not in _ON_CPU})
    assert all(tensor.device.type == "meta" for tensor in tensors)
