"""The inputs of one call of a model as flat lists, and their description, which must be equal on all ranks.

`CallInputs` takes the arguments apart into tensors, numbers and texts, and `FlatInputs` has them as an operator accepts
them (see `input_sync.py`). `describe` puts them into words again, one line for each argument, with a digest.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..nested import like, updated
from .fingerprint import fingerprint
from .forward_count import digest_of

BETWEEN = "\x1e"
"""Separates the texts in a string of several."""
_AN_INT, _A_FLOAT = "an int", "a float"
"""Stand for numbers, whose values are in lists of their own."""


class CallInputs(NamedTuple):
    """The values in a call's arguments, with their names."""

    sent: list[Tensor]
    names: list[str]
    watched: list[Tensor]
    """Tensors that are compared in both modes and never replaced."""
    watched_names: list[str]
    integers: list[int]
    floats: list[float]
    plain: list[tuple[str, str]]
    """Names of the numbers, and names and values of everything else that is not a tensor."""

    def flat(self) -> FlatInputs:
        """The same for an operator."""
        names, watched_names = _joined(self.names), _joined(self.watched_names)
        watched, plain = (
            [tensor.detach() for tensor in self.watched],
            _joined([part for line in self.plain for part in line]),
        )
        return FlatInputs(self.sent, watched, self.integers, self.floats, names, watched_names, plain)


class FlatInputs(NamedTuple):
    """`CallInputs` in the types that an operator accepts. Texts are joined by `BETWEEN`."""

    sent: Sequence[Tensor]
    watched: Sequence[Tensor]
    integers: Sequence[int]
    floats: Sequence[float]
    names: str
    watched_names: str
    plain: str


def _joined(parts: list[str]) -> str:
    return BETWEEN.join([part.replace(BETWEEN, "\\x1e") for part in parts])


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments with their names; keyword arguments are sorted, so that the order is equal on all ranks."""
    placed = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
    return placed + [(name, kwargs[name]) for name in sorted(kwargs)]


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The items of a container, in an order that is equal on all ranks; None if `value` is no container."""
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return [(name, value[name]) for name in sorted(value, key=str)]
    return None


def collect(inputs: CallInputs, name: str, value: Any) -> None:
    """Adds an argument to `inputs`; of a container, all that is in it."""
    items = _items(value)
    if isinstance(value, Tensor):
        if _is_watched(value):
            inputs.watched.append(value)
            inputs.watched_names.append(name)
        else:
            inputs.sent.append(value)
            inputs.names.append(name)
    elif items is not None:
        inputs.plain.append((name, f"{type(value).__name__} of {len(items)}"))
        for key, each in items:
            collect(inputs, f"{name}[{key!r}]", each)
    elif value is None or isinstance(value, (bool, str, bytes, complex, torch.dtype, torch.device, enum.Enum)):
        inputs.plain.append((name, repr(value)))
    elif isinstance(value, int):  # passed on as a number, since it may be symbolic in a graph
        inputs.plain.append((name, _AN_INT))
        inputs.integers.append(value)
    elif isinstance(value, float):
        inputs.plain.append((name, _A_FLOAT))
        inputs.floats.append(value)
    elif isinstance(value, (np.generic, np.ndarray)) and value.dtype != object:
        raw = np.ascontiguousarray(value)
        digest = hashlib.blake2b(raw.tobytes(), digest_size=8).hexdigest()
        inputs.plain.append((name, f"{type(value).__name__} {list(value.shape)} {value.dtype}, values {digest}"))
    else:
        inputs.plain.append((name, type(value).__name__))


def _is_watched(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def replaced(value: Any, sent: Iterator[Tensor], watched: Iterator[Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `collect`.

    Containers without replaced tensors stay the same objects, since a model may write into them.
    """
    if isinstance(value, Tensor):
        return next(watched) if _is_watched(value) else next(sent)
    items = _items(value)
    if items is None:
        return value
    new = {key: replaced(each, sent, watched) for key, each in items}
    if all(new[key] is each for key, each in items):
        return value
    return updated(value, new) if isinstance(value, Mapping) else like(value, [new[key] for key, _ in items])


class Described(NamedTuple):
    """The description of a call that must be equal on all ranks."""

    call: dict[str, str]
    """Descriptions by argument."""
    digest: str


def describe(inputs: FlatInputs, check: bool) -> Described:
    """The description of a call; of tensors it has the values too, where they are watched or `check` is set."""
    tensors = (*inputs.sent, *inputs.watched)
    read = [check] * len(inputs.sent) + [True] * len(inputs.watched)
    return _in_words(
        tuple([(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]),
        tuple([fingerprint(tensor) if each else None for tensor, each in zip(tensors, read)]),
        tuple(map(repr, inputs.integers)),
        tuple(map(repr, inputs.floats)),
        inputs.names if inputs.sent else None,
        inputs.watched_names if inputs.watched else None,
        inputs.plain,
    )


@functools.lru_cache(maxsize=256)  # most calls differ from the previous one only in values of tensors
def _in_words(
    layouts: tuple[tuple[torch.Size, torch.dtype, str], ...],
    values: tuple[str | None, ...],
    integers: tuple[str, ...],
    floats: tuple[str, ...],
    names: str | None,
    watched_names: str | None,
    plain: str,
) -> Described:
    tensor_names = [name for each in (names, watched_names) if each is not None for name in each.split(BETWEEN)]
    lines = [
        (name, _layout(*layout) if value is None else f"{_layout(*layout)}, values {value}")
        for name, layout, value in zip(tensor_names, layouts, values)
    ]
    numbers = {_AN_INT: iter(integers), _A_FLOAT: iter(floats)}
    parts = plain.split(BETWEEN)
    lines += [
        (name, next(numbers[value]) if value in numbers else value) for name, value in zip(parts[::2], parts[1::2])
    ]
    call: dict[str, str] = {}
    for name, value in lines:
        while name in call:  # different keys of a dict can have the same repr
            name += "'"
        call[name] = value
    return Described(call, digest_of(call))


def _layout(shape: torch.Size, dtype: torch.dtype, device: str) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
