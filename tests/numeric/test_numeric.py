"""How cells of the numeric matrix are run and named. Its cells on a CPU: `python -m tests.numeric`."""

from __future__ import annotations

import pytest
import torch

from diffusers_attn import attention_dispatch

from .cell import FAULT, REFUSED, named, outcome, reason_of

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


@pytest.mark.parametrize("provider", ["native", "_native_math"])
@pytest.mark.parametrize("feature", ["causal and key mask", "dropout", "head_dim not innermost", "BlockMask"])
def test_cells_of_one_device(provider, feature):
    found = outcome(provider, feature, "backward", torch.device("cpu"))
    assert "accepts no block mask" in found if feature == "BlockMask" else found["grad"] < 1e-12
