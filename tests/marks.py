"""Which cases of a test the short run has; see `slow` in pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(few: Iterable[Any] | Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`. Those that are not in `few`, or that `few` is false for, are slow."""
    chosen = few if callable(few) else list(few).__contains__
    return [
        value
        if chosen(value)
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
