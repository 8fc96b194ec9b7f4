"""A call's arguments taken apart: tensors, whose values a graph can be given anew, and all else, which it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from ...nested import describe, like, updated

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class GraphCall(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def taken_apart(self, model: str) -> tuple[tuple[object, ...], list[Tensor]]:
        """Everything but the values of tensors, to compare and hash; and the tensors, in an order that the first part
        decides.

        Raises:
            AttentionProviderError: an argument of a kind that has neither. `model` is what it was given to.
        """
        said: list[object] = []
        tensors: list[Tensor] = []
        for index, value in enumerate(self.args):
            _take_apart(f"argument {index}", value, said, tensors, model)
        for name in sorted(self.kwargs):
            _take_apart(name, self.kwargs[name], said, tensors, model)
        return tuple(said), tensors

    def with_tensors(self, tensors: list[Tensor]) -> GraphCall:
        """The same call with others in their place."""
        rest = iter(tensors)
        args = tuple(replaced(value, rest) for value in self.args)
        kwargs = {name: replaced(self.kwargs[name], rest) for name in sorted(self.kwargs)}
        return GraphCall(args, kwargs)


def _take_apart(name: str, value: Any, said: list[object], tensors: list[Tensor], model: str) -> None:
    if isinstance(value, Tensor):
        said.append((name, tuple(value.shape), value.dtype, value.device))
        tensors.append(value)
    elif isinstance(value, _PLAIN):
        said.append((name, type(value), value))
    elif isinstance(value, (list, tuple)):
        said.append((name, type(value), len(value)))
        for index, each in enumerate(value):
            _take_apart(f"{name}[{index}]", each, said, tensors, model)
    elif isinstance(value, Mapping):
        said.append((name, type(value), len(value)))
        for key in sorted(value, key=str):
            _take_apart(f"{name}[{key!r}]", value[key], said, tensors, model)
    else:
        raise AttentionProviderError(
            f"{name} of this call of {model} is {describe(value)}. A CUDA graph takes tensors, plain values, and lists "
            "and dicts of these; what another object holds would be that of the first call for ever. Leave the "
            "argument out, or call remove_cuda_graphs(model) first."
        )


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with the next of `tensors` for every tensor in it."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return like(value, [replaced(each, tensors) for each in value])
    if isinstance(value, Mapping):
        return updated(value, {key: replaced(value[key], tensors) for key in sorted(value, key=str)})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in `value`, in the order in which `replaced` takes them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors_of(each)]
    if isinstance(value, Mapping):
        return [tensor for key in sorted(value, key=str) for tensor in tensors_of(value[key])]
    return []
