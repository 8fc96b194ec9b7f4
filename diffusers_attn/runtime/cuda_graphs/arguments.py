"""Separates a call's tensors, whose values change from replay to replay, from the rest, which a graph fixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ...nested import describe, like, updated

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class GraphCall(NamedTuple):
    """The arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def taken_apart(self, model: str) -> tuple[tuple[object, ...], list[Tensor]]:
        """A hashable description of everything but the values of tensors, and the tensors. Calls with equal
        descriptions have their tensors in the same order.

        Args:
            model: name of the model, for messages.

        Raises:
            AttentionProviderError: an argument is neither a tensor, a plain value, nor a list or dict of these.
        """
        constants: list[object] = []
        tensors: list[Tensor] = []
        for index, value in enumerate(self.args):
            _take_apart(f"argument {index}", value, constants, tensors, model)
        for name in sorted(self.kwargs):
            _take_apart(name, self.kwargs[name], constants, tensors, model)
        return tuple(constants), tensors

    def with_tensors(self, tensors: list[Tensor]) -> GraphCall:
        """The same call with these tensors in place of its own."""
        rest = iter(tensors)
        args = tuple(_replaced(value, rest) for value in self.args)
        kwargs = {name: _replaced(self.kwargs[name], rest) for name in sorted(self.kwargs)}
        return GraphCall(args, kwargs)


def is_plain(value: object) -> bool:
    """Whether `value` is immutable and holds no tensor."""
    return isinstance(value, _PLAIN)


def _take_apart(name: str, value: Any, constants: list[object], tensors: list[Tensor], model: str) -> None:
    if isinstance(value, Tensor):
        strides = None if value.is_contiguous() else value.stride()
        constants.append((name, tuple(value.shape), strides, value.dtype, value.device))
        tensors.append(value)
    elif isinstance(value, _PLAIN):
        constants.append((name, type(value), value))
    elif isinstance(value, (list, tuple)):
        constants.append((name, type(value), len(value)))
        for index, each in enumerate(value):
            _take_apart(f"{name}[{index}]", each, constants, tensors, model)
    elif isinstance(value, Mapping):
        constants.append((name, type(value), len(value)))
        for key in sorted(value, key=str):
            _take_apart(f"{name}[{key!r}]", value[key], constants, tensors, model)
    else:
        raise AttentionProviderError(
            f"{name} of this call of {model} is {describe(value)}. A CUDA graph takes tensors, plain values, and lists "
            "and dicts of these; changes within another object would have no effect on a replay. Leave the argument "
            "out, or call remove_cuda_graphs(model) first."
        )


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with each of its tensors replaced by the next of `tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return like(value, [_replaced(each, tensors) for each in value])
    if isinstance(value, Mapping):
        return updated(value, {key: _replaced(value[key], tensors) for key in sorted(value, key=str)})
    return value
