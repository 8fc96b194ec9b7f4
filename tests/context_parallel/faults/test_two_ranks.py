"""A rank that is killed, fails, stops or goes elsewhere: the other ends soon, with an error that names it. It waits for
one that computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ... import launching
from ...marks import thorough_but

FORWARD = "of FluxTransformer2DModel"
AT_THE_SECOND = f"was last at forward 2 {FORWARD}, which is over"
FAULTS = {
    # The hosts meet at the beginning of a forward.
    ("is_killed", "between", "broadcast"): f"rank 1, whose process has ended, {AT_THE_SECOND}",
    (
        "is_stopped",
        "between",
        "broadcast",
    ): f"rank 1, whose process is stopped (SIGSTOP, or a debugger), {AT_THE_SECOND}",
    ("waits", "between", "check"): f"rank 1 {AT_THE_SECOND}",
    # An exchange over gloo, which fails by itself if a process ends, and otherwise cannot be ended.
    ("is_killed", "within", "broadcast"): f"rank 1, whose process has ended, was last at forward 3 {FORWARD}",
    ("is_stopped", "within", "broadcast"): "rank 1, whose process is stopped (SIGSTOP, or a debugger), was last at "
    f"forward 3 {FORWARD}",
    ("fails", "within", "broadcast"): f"rank 1 was last at forward 3 {FORWARD} (which failed there with "
    "ZeroDivisionError: this rank has a fault)",
    ("waits", "between", "trust"): f"rank 1 {AT_THE_SECOND}",
}


def of_first_rank(*fault: str, device: str = "cpu") -> tuple[int, str]:
    """Its exit code, and what both ranks printed and logged."""
    done = launching.run_ranks(2, Path(__file__).with_name("two_ranks.py"), *fault, device, of=0)
    return done.returncode, done.stdout + done.stderr


QUICK = ["is_killed between broadcast", "is_stopped within broadcast"]


@pytest.mark.slow
@pytest.mark.parametrize("words", thorough_but(QUICK, map(" ".join, FAULTS)))
def test_the_other_rank_names_it(words: str) -> None:
    fault = tuple(words.split())
    code, text = of_first_rank(*fault)
    assert FAULTS[fault] in text
    ends = fault[0] != "is_killed" and (fault[1] == "within" or fault[2] == "trust")
    assert code == int(ends)
    if ends:
        assert "no rank computed anything" in text and "This process ends, since an exchange over gloo" in text
    else:
        [seconds] = re.findall(r"^waited (.*)", text, re.M)
        assert float(seconds) < 60 and "rank 0: RankMissingError" in text


@pytest.mark.slow
@pytest.mark.parametrize("where", thorough_but(["between"], ["between", "within"]))
def test_a_rank_that_computes_is_waited_for(where: str) -> None:
    code, text = of_first_rank("computes", where, "broadcast")
    assert code == 0 and "no error" in text and "RankMissingError" not in text


@pytest.mark.slow
def test_a_rank_that_computes_for_ever_is_waited_for_as_long_as_the_user_says() -> None:
    code, text = of_first_rank("computes_for_ever", "between", "broadcast")
    [seconds] = re.findall(r"^waited (.*)", text, re.M)
    assert code == 0 and "rank 0: RankMissingError" in text and f"rank 1 {AT_THE_SECOND}" in text
    assert 5 < float(seconds) < 60  # TIMEOUT is 6
