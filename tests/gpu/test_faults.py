"""Ranks with a GPU each that are killed, stopped, fail or differ: the others end soon, with an error that names one."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel

from ..context_parallel.comm.test_rank_progress import lora
from ..context_parallel.faults.test_two_ranks import FAULTS, of_first_rank
from ..parallelize.test_enable import build, inputs, output
from .several import SEVERAL_GPUS, SIZE

pytestmark = SEVERAL_GPUS
TWO = [
    ("is_killed", "between", "broadcast"),
    ("is_stopped", "between", "broadcast"),
    ("waits", "between", "check"),
    ("is_killed", "within", "broadcast"),
    ("fails", "within", "broadcast"),
]


@pytest.mark.parametrize("fault", TWO, ids=" ".join)
def test_the_other_rank_names_it(fault):
    code, text = of_first_rank(*fault, device="cuda")
    assert code == 0 and "rank 0: RankMissingError" in text and FAULTS[fault] in text, text
    [seconds] = re.findall(r"^waited (.*)", text, re.M)
    assert float(seconds) < 60


def test_a_rank_that_computes_is_waited_for():
    code, text = of_first_rank("computes", "between", "broadcast", device="cuda")
    assert code == 0 and "no error" in text and "RankMissingError" not in text, text


@torch.no_grad()
def unlike(meshes):
    """The errors of calls while the second rank has something else, and the error of the last, when it has not."""
    odd, model = dist.get_rank() == 1, lora(build("flux")).to("cuda")
    given = {name: each.to("cuda") if isinstance(each, torch.Tensor) else each for name, each in inputs("flux").items()}
    expected, found = output(model, given), {}
    enable_context_parallel(model, verbose=False)
    shorter = {**given, **{name: given[name].narrow(-2, 0, 4) for name in ("hidden_states", "img_ids")}}
    changes = {
        "scale": (lambda: model.set_adapters(["style"], [0.5]), lambda: model.set_adapters(["style"], [1.0])),
        "dtype": (model.float, model.double),
        "shape": (lambda: None, lambda: None),
    }
    for name, (change, restore) in changes.items():
        if odd:
            change()
        try:
            output(model, shorter if odd and name == "shape" else given)
            found[name] = "no error"
        except AttentionProviderError as error:
            found[name] = str(error)
        if odd:
            restore()
    last = ((output(model, given) - expected).abs().max() / expected.abs().max()).item()
    disable_context_parallel(model)
    return found, last


def test_ranks_that_differ(gpus):
    results = gpus.run(SIZE, unlike)
    for found, last in results:
        assert found == results[0][0]
        assert "scale 0.5" in found["scale"] and "on rank 1" in found["scale"]
        assert "dtypes of weights: float64 on rank" in found["dtype"] and "float32 on rank 1" in found["dtype"]
        assert "rank 1" in found["shape"]
        assert last < 1e-10
