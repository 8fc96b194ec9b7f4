"""`examples/context_parallel_from_scratch.py` on two CPU processes."""

from __future__ import annotations

import re

from . import launching
from .test_quickstart import ROOT


def test_ulysses_and_ring_agree_with_one_process() -> None:
    done = launching.run_ranks(2, ROOT / "examples" / "context_parallel_from_scratch.py")
    assert done.returncode == 0, done.stderr
    errors = dict(re.findall(r"(\w+)_attention on 2 ranks: largest error of output and gradients (\S+)", done.stdout))
    assert errors.keys() == {"ulysses", "ring"}
    assert all(float(error) < 1e-12 for error in errors.values()), errors
