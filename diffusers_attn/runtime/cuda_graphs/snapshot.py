"""Detects changes in a model that make its recorded graphs invalid.

A graph contains the addresses of weights, the kernels that processors chose, and the scales of adapters. A user may
change each of these between two steps: load or scale a LoRA, fuse projections, bind another provider, move the model.
So all modules are compared by object identity before each replay. This takes about a millisecond of Python for a model
of a thousand modules, while the device still works on earlier launches.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class Snapshot:
    """The attributes of a model's modules and processors, and the addresses of its weights.

    Args:
        model: the model. The snapshot refers to its contents, and not to the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[Any, tuple[Any, ...]]] = []
        self._empty: list[Any] = []
        """Empty containers: most are the dicts of hooks that every module has."""
        self._addresses: list[tuple[Tensor, int]] = []
        for module in model.modules():
            self._hold(vars(module))
            processor = getattr(getattr(module, "processor", None), "__dict__", None)
            if processor:
                self._hold(processor)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._addresses.append((tensor, tensor.data_ptr()))

    def _hold(self, attributes: dict[str, Any]) -> None:
        self._held.append((attributes, tuple(attributes.values())))
        for name, value in attributes.items():
            if isinstance(value, (dict, list)) and name not in _NO_MATTER:
                if value:
                    self._held.append((value, tuple(_contents(value))))
                else:
                    self._empty.append(value)

    def holds(self) -> bool:
        """Whether nothing has changed since the snapshot was taken."""
        if any(self._empty):
            return False
        for container, before in self._held:
            if len(container) != len(before):
                return False
            if not (all(map(is_, _contents(container), before)) or all(map(_same, _contents(container), before))):
                return False
        return all(tensor.data_ptr() == address for tensor, address in self._addresses)


def _contents(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


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
