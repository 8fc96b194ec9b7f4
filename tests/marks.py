"""Which cases of a test the usual runs have; see `thorough` in pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thorough_but(few: Iterable[Any] | Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`. Those that are not in `few`, or that `few` is false for, are thorough."""
    chosen = few if callable(few) else list(few).__contains__
    return [
        value
        if chosen(value)
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)
        for value in values
    ]
