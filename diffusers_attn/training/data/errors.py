"""Problems with the data. All of them are collected and reported together, so that they can be fixed in one go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)

ON_BAD_DATA = ("skip", "refuse")
NAMED = 20
"""Largest number of problems that a message names."""
_LONGEST = 400
"""Largest number of characters of a problem in a message."""


class Problem(NamedTuple):
    """A problem with one part of the data."""

    name: str
    """File, line or row with the problem."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class TrainingDataError(ValueError):
    """The data cannot be used. The message names the first problems.

    Attributes:
        problems: all problems found.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join([message, *_named(problems)]))
        self.problems = tuple(problems)


def _named(problems: Sequence[Problem]) -> list[str]:
    """A line for each of the first problems, and one with the number of the others."""
    lines = [f"  {_shortened(str(problem))}" for problem in problems[:NAMED]]
    rest = len(problems) - len(lines)
    return [*lines, *([f"  and {rest:,} more"] if rest else [])]


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def check_on_bad_data(on_bad_data: str) -> None:
    """Raises a `TrainingDataError` unless `on_bad_data` is "skip" or "refuse"."""
    if on_bad_data not in ON_BAD_DATA:
        raise TrainingDataError(f"on_bad_data={on_bad_data!r}: accepted are {', '.join(map(repr, ON_BAD_DATA))}.")


def report_problems(
    problems: Sequence[Problem], usable: int, where: str, on_bad_data: str, main_process: bool = True
) -> None:
    """Raises an error that names the problems, or logs one warning if they may be skipped.

    Args:
        problems: all problems found.
        usable: number of examples without a problem.
        where: name of the data for the message.
        on_bad_data: "skip" or "refuse".
        main_process: whether this process logs the warning.

    Raises:
        TrainingDataError: there are problems and `on_bad_data` is "refuse", or no example is usable.
    """
    if usable == 0:
        raise TrainingDataError(f"{where}: no usable example{':' if problems else '.'}", problems)
    if not problems:
        return
    if on_bad_data == "refuse":
        raise TrainingDataError(
            f"{where}: {len(problems)} of the files or rows cannot be used; {usable} examples can. Fix them, or pass "
            "on_bad_data='skip' to train on the rest:",
            problems,
        )
    if main_process:
        named = "\n".join(_named(problems))
        log.warning("%s: skipped %d, which leaves %d examples:\n%s", where, len(problems), usable, named)
