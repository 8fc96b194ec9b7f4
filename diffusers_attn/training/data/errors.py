"""Bad data by name: every problem is collected before anything is said, so that a data set is mended in one go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)

ON_BAD_DATA = ("skip", "refuse")
NAMED = 20
"""how many problems a message names; more would hide what it says."""


class Problem(NamedTuple):
    """One thing that is wrong with the data."""

    name: str
    """the file, line or row that it is about."""
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class TrainingDataError(ValueError):
    """Data that cannot be trained on as it is; `problems` names everything that was found, the message the first."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join([message, *_named(problems)]))
        self.problems = tuple(problems)


def _named(problems: Sequence[Problem]) -> list[str]:
    """A line for each of the first problems, and one for the rest."""
    lines = [f"  {_shortened(str(problem))}" for problem in problems[:NAMED]]
    rest = len(problems) - len(lines)
    return [*lines, *([f"  and {rest:,} more"] if rest else [])]


def _shortened(line: str, most: int = 400) -> str:
    return line if len(line) <= most else f"{line[:most]}..."


def check_on_bad_data(on_bad_data: str) -> None:
    """Raises a `TrainingDataError` where it is neither "skip" nor "refuse"."""
    if on_bad_data not in ON_BAD_DATA:
        raise TrainingDataError(f"on_bad_data={on_bad_data!r}; it is one of {', '.join(map(repr, ON_BAD_DATA))}.")


def settle(problems: Sequence[Problem], left: int, where: str, on_bad_data: str, main_process: bool = True) -> None:
    """Does with `problems` what was asked for: refuses them all, or names them all in one warning and goes on.

    Args:
        problems: everything found in the data at `where`.
        left: how many examples have no problem.
        on_bad_data: "skip" or "refuse".
        main_process: whether this process is the one that logs.

    Raises:
        TrainingDataError: there are problems and they are refused, or nothing is left.
    """
    if left == 0:
        raise TrainingDataError(f"{where}: no example that can be trained on{':' if problems else '.'}", problems)
    if not problems:
        return
    if on_bad_data == "refuse":
        raise TrainingDataError(
            f"{where}: {len(problems)} of what is there cannot be used, and {left} examples can. Mend it, or pass "
            "on_bad_data='skip' to train on the rest:",
            problems,
        )
    if main_process:
        named = "\n".join(_named(problems))
        log.warning("%s: skipped %d, which leaves %d examples:\n%s", where, len(problems), left, named)
