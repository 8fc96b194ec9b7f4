"""Which cases of a test the shorter runs have; see `slow` and `thorough` in pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(few: Iterable[Any] | Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`. Those that are not in `few`, or that `few` is false for, are slow."""
    return _marked(pytest.mark.slow, few, values)


def thorough_but(few: Iterable[Any] | Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """As `slow_but`; the others are thorough."""
    return _marked(pytest.mark.thorough, few, values)


def _marked(mark: Any, few: Iterable[Any] | Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    chosen = few if callable(few) else list(few).__contains__
    return [
        value if chosen(value) else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value in values
    ]
