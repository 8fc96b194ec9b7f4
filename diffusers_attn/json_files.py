"""Reads JSON that others may have written: of a size that fits, and with one error for all that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26
"""Largest file that is read. The longest that this library writes has some megabytes."""


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The value in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, is nested too deeply, or has more than `most` bytes.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return parse_json(data)


def parse_json(text: str | bytes) -> Any:
    """The value in a text. Raises ValueError if it is no JSON, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
