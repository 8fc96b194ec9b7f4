"""The expected outcomes of the matrix, `outcomes.json`: by feature and way, a text or one for each order."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("outcomes.json")
ON_GPUS = Path(__file__).with_name("outcomes_on_gpus.json")
Outcome = str | dict[str, str]


def merged(by_order: dict[str, str]) -> Outcome:
    """One text where the order does not matter."""
    return next(iter(by_order.values())) if len(set(by_order.values())) == 1 else by_order


def expected_outcomes(file: Path = FILE) -> dict[str, dict[str, Outcome]]:
    """By the names of features and ways."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(outcomes: dict[str, dict[str, Outcome]], file: Path = FILE) -> None:
    file.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False) + "\n")
