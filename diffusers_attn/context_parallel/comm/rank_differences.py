"""Compares the properties of ranks, for error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def differences(values: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """A line for every name whose values differ between ranks, from (rank, values by name) pairs."""
    lines = []
    for name in dict.fromkeys(name for _, each in values for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in values:
            ranks.setdefault(each.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            lines.append(
                f"{name}: " + "; ".join(f"{value} on {ranks_in_words(having)}" for value, having in ranks.items())
            )
    return lines


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
