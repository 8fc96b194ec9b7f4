"""The variants that a training benchmark measures: strategy, provider, and whether blocks are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """A variant to measure."""

    strategy: str
    provider: str
    compiled: bool


def extra_choices(extras: Sequence[str], names: Sequence[str], compiled: bool) -> list[Choice]:
    """The variants named by `--extra`, with strategies from `names`. `compiled` is their default for compilation."""
    choices = []
    for extra in extras:
        name, provider, how = (*extra.split(":"), "", "")[:3]
        if name not in names or not provider or how not in ("", "eager", "compiled"):
            raise SystemExit(
                f"--extra {extra}: STRATEGY:PROVIDER, STRATEGY:PROVIDER:eager and STRATEGY:PROVIDER:compiled are "
                f"accepted, with one of {', '.join(names)}"
            )
        choices.append(Choice(name, provider, how == "compiled" if how else compiled))
    return choices


def blocks(result: dict[str, Any]) -> str:
    """The variants' compilation in words, for a table."""
    return "compiled" if result["compiled"] else "eager"
