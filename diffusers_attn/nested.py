"""Copies of lists, tuples and mappings of tensors, with the same types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def like(value: Any, items: list[Any]) -> Any:
    """`items` in a list, tuple or named tuple of the type of `value`."""
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def updated(value: Mapping[str, Any], items: Mapping[str, Any]) -> Any:
    """A copy of `value`, a dict or one of diffusers' output objects, with `items` replaced."""
    if type(value) is dict:
        return {**value, **items}
    return type(value)(**{**value, **items})


def describe(value: Any) -> str:
    """A short description of `value` for errors, such as "a tensor [2, 3]"."""
    if isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    return f"a {type(value).__name__}"
