"""What a recorded graph relies on beside its call's arguments, and whether it still holds.

A graph has the addresses of weights, the kernels that processors chose and the scales of adapters in it. A user may
change each of these between two steps: load a LoRA, scale it, fuse projections, bind another provider, move the model.
So before each replay all modules are looked at. That is a comparison of object identities, about a millisecond of
Python for a model of a thousand modules, in which the device works on what it was given before.
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
"""of what every module has: what says nothing of its forward."""


class Snapshot:
    """The attributes of a model's modules and of their processors, and where its weights lie.

    Args:
        model: to look at. The snapshot refers to what is within it, and not to the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[Any, tuple[Any, ...]]] = []
        self._empty: list[Any] = []
        """containers, by far the most: dicts of hooks that nobody has set."""
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
        """Whether all is as it was."""
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
    """The same object, or another one of the same plain value."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_same, now, before))
    return isinstance(now, _BY_VALUE) and bool(now == before)


def surroundings() -> tuple[object, ...]:
    """What a forward takes from its thread and process, to compare and hash."""
    return (
        scope.choice,
        scope.parallel,
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
    )
