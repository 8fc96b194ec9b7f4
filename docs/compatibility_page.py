"""The tables of docs/compatibility.md, from the outcomes that tests/compatibility expects of every cell."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.compatibility.cell import EXACT, OFF, REFUSED, WITH, WITHOUT
from tests.compatibility.features import KINDS, NOT_RUN
from tests.compatibility.outcomes import Outcome, expected_outcomes
from tests.compatibility.ways import WAYS

SIGNS = {EXACT: "✓", OFF: "\N{EN DASH}", WITHOUT: "○"}


def tables() -> str:
    """A table for each kind of feature, and below it the messages of its refusals."""
    return "\n\n".join(_table(kind) for kind in KINDS)


def _table(kind: str) -> str:
    outcomes = {name: row for name, row in expected_outcomes().items() if name in KINDS[kind]}
    ways = [way for way in WAYS if any(way in row for row in outcomes.values())]
    messages: dict[str, int] = {}
    lines = ["", *(WAYS[way].title for way in ways)], ["---"] * (len(ways) + 1)
    rows = [[name, *(_cell(row.get(way, ""), messages) for way in ways)] for name, row in outcomes.items()]
    parts = [f"### {kind}", "\n".join("| " + " | ".join(line) + " |" for line in (*lines, *rows))]
    if messages:
        parts.append("\n".join(f"{number}. {message}" for message, number in messages.items()))
    if kind in NOT_RUN:
        parts.append(
            "Not in the table: " + "; ".join(f"{name} ({reason})" for name, reason in NOT_RUN[kind].items()) + "."
        )
    return "\n\n".join(parts)


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
