"""Detects changes in a model that make its recorded graphs invalid.

A graph contains the addresses of weights, the kernels that processors chose, and the scales of adapters. A user may
change each of these between two steps: load or scale a LoRA, fuse projections, bind another provider, move the model.
So all modules are compared by object identity before each replay. A pipeline that waits for its device between two
steps, as diffusers' UniPC scheduler does, waits for this comparison as well, so it is made of few passes over all
modules. `benchmarks/cuda_graph_check.py` measures it: a millisecond for the 1,279 modules of Flux.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ...scope import scope

_BY_VALUE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_NO_MATTER = frozenset(
    f"_{name}"
    for name in (
        "non_persistent_buffers_set backward_pre_hooks backward_hooks is_full_backward_hook forward_hooks_with_kwargs "
        "forward_hooks_always_called forward_pre_hooks_with_kwargs state_dict_hooks state_dict_pre_hooks "
        "load_state_dict_pre_hooks load_state_dict_post_hooks"
    ).split()
)
"""Attributes of `nn.Module` that do not affect its forward."""
_CALL = "_call_impl"
"""Attribute of a model whose calls are watched, such as by `component_times`: it calls the forward, and only that is
recorded."""


class _WithoutCall(Collection[Any]):
    """The attributes of the recorded model as they are now, except the one that watches its calls."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes

    def __len__(self) -> int:
        return len(self._attributes) - (_CALL in self._attributes)

    def __iter__(self) -> Iterator[Any]:
        return (value for name, value in self._attributes.items() if name != _CALL)

    def __contains__(self, value: object) -> bool:
        return any(each is value for each in self)


class Snapshot:
    """The attributes of a model's modules and processors, and the addresses of its weights.

    Args:
        model: the model. The snapshot refers to its contents, and not to the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._contents: list[Collection[Any]] = []
        """Contents of dicts and lists, as they are now: a view of a dict's values follows the dict."""
        self._empty: list[Any] = []
        """Empty containers: most are the dicts of hooks that every module has."""
        self._tensors: list[Tensor] = []
        for module in model.modules():
            attributes = vars(module)
            self._hold(attributes, _WithoutCall(attributes) if module is model else attributes.values())
            processor = getattr(getattr(module, "processor", None), "__dict__", None)
            if processor:
                self._hold(processor, processor.values())
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._tensors.extend([tensor for tensor in tensors if tensor is not None])
        self._lengths = list(map(len, self._contents))
        self._values = list(chain.from_iterable(self._contents))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _hold(self, attributes: dict[str, Any], contents: Collection[Any]) -> None:
        self._contents.append(contents)
        for name, value in attributes.items():
            if isinstance(value, (dict, list)) and name not in _NO_MATTER:
                if not value:
                    self._empty.append(value)
                else:
                    self._contents.append(value.values() if isinstance(value, dict) else value)

    def holds(self) -> bool:
        """Whether nothing has changed since the snapshot was taken."""
        # Each pass runs in C. Nearly always, all objects are the same ones.
        if any(self._empty) or list(map(len, self._contents)) != self._lengths:
            return False
        same = all(map(is_, chain.from_iterable(self._contents), self._values))
        if not same and not all(map(_same, chain.from_iterable(self._contents), self._values)):
            return False
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses


def _same(now: Any, before: Any) -> bool:
    """Whether both are the same object, or plain values of the same type that are equal."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_same, now, before))
    return isinstance(now, _BY_VALUE) and bool(now == before)


def surroundings() -> tuple[object, ...]:
    """The settings of this thread and process that a forward depends on. Hashable."""
    return (
        scope.choice,
        scope.parallel,
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
    )
