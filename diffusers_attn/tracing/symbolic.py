"""Functions on sizes that also work on the symbolic sizes of a dynamic graph.

In a dynamic graph a size is a `SymInt`: arithmetic on it becomes part of the graph, and a comparison becomes a guard.
Dynamo does not sort by symbolic sizes, and `divmod` of one is an error. These functions work eagerly and while Dynamo
traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def constant(size: int) -> int:
    """`size` as a plain number, for sizes such as heads and head_dim that decide how a call is computed.

    Dynamo specialises the length of a range. In eager mode, this is the identity.
    """
    return len(range(size))


def ceil_div(size: int, parts: int) -> int:
    """`size / parts`, rounded up."""
    return (size + parts - 1) // parts


def sort(items: Iterable[T], key: Callable[[T], tuple[Any, ...]] = lambda item: item) -> list[T]:  # type: ignore[assignment, return-value]
    """`sorted(items, key=key)`, for keys that are tuples of sizes, or of such tuples."""
    if not torch.compiler.is_dynamo_compiling():
        return sorted(items, key=key)
    found: list[T] = []
    for item in items:
        index = len(found)
        while index > 0 and _less(key(item), key(found[index - 1])):
            index -= 1
        found.insert(index, item)
    return found


def _less(one: Any, other: Any) -> bool:
    if not isinstance(one, tuple):
        return True if one < other else False
    for first, second in zip(one, other):
        if _less(first, second):
            return True
        if _less(second, first):
            return False
    return len(one) < len(other)


def equal(one: Any, other: Any) -> bool:
    """`one == other`, for sizes and tuples of them."""
    if not isinstance(one, tuple):
        return True if one == other else False
    return len(one) == len(other) and all(equal(first, second) for first, second in zip(one, other))
