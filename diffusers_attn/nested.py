"""Copies of lists, tuples and mappings of tensors, with the same types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a nest of lists, tuples and mappings, with each tensor replaced by the result of `change`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return like(value, [mapped(each, change) for each in value])
    if isinstance(value, Mapping):
        return updated(value, {key: mapped(each, change) for key, each in value.items()})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nest of lists, tuples and mappings, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def all_tensors_in(value: Any) -> list[Tensor]:
    """As `tensors_in`, also in dataclasses, whatever their type."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):  # such as the output classes of diffusers, which are dataclasses too
        return all_tensors_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in all_tensors_in(each)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all_tensors_in([getattr(value, field.name, None) for field in dataclasses.fields(value)])
    return []
