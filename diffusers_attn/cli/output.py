"""The output of the commands: tables and text for people, JSON for scripts.

On a terminal, tables have rules and colours and fit its width. In a pipe or a file they are plain text in columns, one
row a line, without colours and without line breaks that depend on a width.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = {"ok": "green", "error": "bold red", "warning": "yellow", "note": "cyan"}


def console(*, stderr: bool = False) -> Console:
    """A console on today's stdout or stderr. Rich follows `NO_COLOR`, `FORCE_COLOR` and `COLUMNS`."""
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False)


def say(text: str = "", style: str | None = None) -> None:
    """Prints lines of text. Long lines wrap at words on a terminal, and stay whole elsewhere."""
    out = console()
    out.print(Text(text, style=style or ""), soft_wrap=not out.is_terminal)


def heading(text: str) -> None:
    say()
    say(text, "bold")


def complain(text: str) -> None:
    """Prints an error to stderr."""
    out = console(stderr=True)
    out.print(Text("error: ", style="bold red") + Text(text), soft_wrap=not out.is_terminal)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Prints a table.

    Args:
        numbers: names of the columns to align at the right.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    out = console()
    if not out.is_terminal:
        widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]
        for row in [list(header), *rows]:
            cells = (
                cell.rjust(width) if name in numbers else cell.ljust(width)
                for cell, width, name in zip(row, widths, header)
            )
            out.print("  ".join(cells).rstrip(), soft_wrap=True)
        return
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        drawn.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    out.print(drawn)


def digits(value: float) -> str:
    """A number with three significant digits, and no exponent: 0.0123, 4.56, 1,250."""
    if value == 0 or value - value != 0:
        return str(value)
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def write_json(command: str, version: int, content: dict[str, Any]) -> None:
    """Prints one JSON object, which begins with its schema: `"schema": "diffusers-attn/doctor/1"`.

    Args:
        version: version of the schema. Keys may be added to a version, but never removed or changed.
    """
    found = {"schema": f"diffusers-attn/{command}/{version}", **content}
    sys.stdout.write(json.dumps(_plain(found), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """`value` as JSON has it: infinite and undefined numbers are null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
