"""A rank that fails in its branch: ranks that wait for its output get an error that names it and its error."""

from __future__ import annotations

from pathlib import Path

import pytest

from .. import launching


@pytest.mark.parametrize("failing", [0, 1])
def test_the_other_rank_names_it(failing: int) -> None:
    done = launching.run_ranks(2, Path(__file__).with_name("failing_rank.py"), str(failing))
    assert done.returncode == 0, done.stderr
    lines = {line[5]: line[8:] for line in done.stdout.splitlines() if line.startswith("rank ")}
    assert lines[str(failing)] == "ZeroDivisionError: this rank has a fault"
    waiting = lines[str(1 - failing)]
    assert waiting.startswith("RankMissingError") and f"rank {failing} is missing" in waiting
    assert "failed there with ZeroDivisionError: this rank has a fault" in waiting
