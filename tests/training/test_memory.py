"""Memory of each process in training, at the size of a real model, computed without allocating it."""

from __future__ import annotations

import json
import sys

import pytest

from .. import launching
from ..test_quickstart import ROOT
from .activation_memory import RANKS, SHAPES


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    # A process of its own: PyTorch has one process group, and this one is of ranks that are not there.
    command = [sys.executable, "-m", "tests.training.activation_memory"]
    done = launching.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in SHAPES if SHAPES[name]])
def test_activation_memory_is_a_ranks_share(peaks: dict[str, float], strategy: str) -> None:
    """Within 15 %, with two blocks of thirty; a block's input that is kept for each of the others only evens it out."""
    assert peaks["one process"] > 4000  # MiB: it is the real size
    assert peaks["one process"] / RANKS <= peaks[strategy] <= 1.15 * peaks["one process"] / RANKS
