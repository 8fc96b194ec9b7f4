"""The tables of docs/compatibility.md, from the outcomes that tests/compatibility expects of every cell."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.compatibility.cell import EXACT, OFF, REFUSED, WITH, WITHOUT
from tests.compatibility.features import KINDS, NOT_RUN
from tests.compatibility.outcomes import ON_GPUS, Outcome, expected_outcomes
from tests.compatibility.ways import GPU_WAYS, WAYS, Way

SIGNS = {EXACT: "✓", OFF: "\N{EN DASH}", WITHOUT: "○"}


def tables() -> str:
    """A table for each kind of feature, and below it the messages of its refusals."""
    outcomes = expected_outcomes()
    parts = []
    for kind, features in KINDS.items():
        rows = {name: row for name, row in outcomes.items() if name in features}
        parts += [f"### {kind}", *_table(rows, WAYS)] if rows else []
        if kind in NOT_RUN:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in NOT_RUN[kind].items())
            parts.append(f"Not in the table: {reasons}.")
    on_gpus = expected_outcomes(ON_GPUS)
    names = ", ".join(KINDS["What needs a GPU"])
    not_run = (
        f"`tests/gpu/test_compatibility.py` has CUDA graphs under these features, and {names}. No run is recorded."
    )
    parts += ["### On GPUs", *(_table(on_gpus, GPU_WAYS) if on_gpus else [not_run])]
    return "\n\n".join(parts)


def _table(outcomes: dict[str, dict[str, Outcome]], columns: dict[str, Way]) -> list[str]:
    """A table, and its notes."""
    ways = [way for way in columns if any(way in row for row in outcomes.values())]
    messages: dict[str, int] = {}
    lines = ["", *(columns[way].title for way in ways)], ["---"] * (len(ways) + 1)
    rows = [[name, *(_cell(row.get(way, ""), messages) for way in ways)] for name, row in outcomes.items()]
    parts = ["\n".join("| " + " | ".join(line) + " |" for line in (*lines, *rows))]
    if messages:
        parts.append("\n".join(f"{number}. {message}" for message, number in messages.items()))
    return parts


def _cell(outcome: Outcome, messages: dict[str, int]) -> str:
    if isinstance(outcome, str):
        return _sign(outcome, messages)
    return ", ".join(f"{_sign(each, messages)} {order}" for order, each in outcome.items())


def _sign(outcome: str, messages: dict[str, int]) -> str:
    """The sign for an outcome. A message becomes the text of a footnote."""
    kind, _, message = outcome.partition(": ")
    if kind == REFUSED:
        return f"✗ ({messages.setdefault(message, len(messages) + 1)})"
    if kind.startswith(WITH):
        words = f"With `{kind.removeprefix(WITH)}`. Without it, an error says so."
        return f"✓ ({messages.setdefault(words, len(messages) + 1)})"
    return SIGNS[outcome] if outcome else ""
