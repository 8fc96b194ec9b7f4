"""Copies of a split model are not split, and have the processors that the model had before.

Hooks of a plan reference process groups and the module on which they are set. A copy with these hooks
(`copy.deepcopy`, pickle, `torch.save`) would be half of a split model, which nothing manages and which cannot be loaded
elsewhere. So every module with such hooks leaves them out of the state that copy and pickle receive.

A shallow copy (`copy.copy`) shares its submodules, and their hooks, with the split model. It refuses to run while that
model is split.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from ...errors import AttentionProviderError
from ..compile.own_forward import without_own

_GETSTATE = "__getstate__"  # as an attribute of the module itself: copy and pickle ask there before they ask its class
_PACKAGE = __name__.partition(".")[0] + "."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def leave_hooks_out(module: nn.Module) -> None:
    """Leaves this library's hooks out of copies of `module`."""
    if _GETSTATE not in vars(module):
        vars(module)[_GETSTATE] = _State(module)


def leaves_hooks_out(module: nn.Module) -> bool:
    """Whether `leave_hooks_out` was called for `module`: it has hooks of this library."""
    return _GETSTATE in vars(module)


def keep_hooks(module: nn.Module) -> None:
    """Undoes `leave_hooks_out`, once `module` has no such hooks."""
    if not _numbers(module):
        vars(module).pop(_GETSTATE, None)


def change_copies(module: nn.Module, change: Callable[[dict[str, Any]], None]) -> None:
    """Calls `change` with the state of each copy of `module`, which has no hooks of this library, to change it."""
    leave_hooks_out(module)
    vars(module)[_GETSTATE].change = change


def check_not_split(module: nn.Module) -> None:
    """Raises AttentionProviderError if modules within `module` belong to a split model."""
    shared = next((path for path, each in module.named_modules() if _GETSTATE in vars(each)), None)
    if shared is not None or _shallow(module) is not None:
        part = f"its '{shared}' belongs to" if shared else "it is a shallow copy, or a part, of"
        raise AttentionProviderError(
            f"this {type(module).__name__} cannot be split between ranks: {part} a model that is split already. Call "
            "disable_context_parallel (or remove_context_parallel) on that model first, or give a copy of its own: "
            "copy.deepcopy(model)."
        )


def check_not_shallow(module: nn.Module) -> None:
    """Raises AttentionProviderError if `module` is a shallow copy of a split model."""
    guard = _shallow(module)
    if guard is not None:
        guard(module, ())


def _shallow(module: nn.Module) -> _Guard | None:
    guard = module._forward_pre_hooks.get(_Guard.NUMBER)
    return guard if isinstance(guard, _Guard) and guard.is_split() else None


def _numbers(module: nn.Module) -> set[int]:
    """Numbers of this library's hooks on `module`."""
    return {
        number
        for name in _HOOKS
        for number, hook in vars(module)[name].items()
        if (getattr(hook, "__module__", None) or "").startswith(_PACKAGE) and not isinstance(hook, _Guard)
    }


class _State:
    """The `__getstate__` of a module with hooks: the state for copy and pickle."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.change: Callable[[dict[str, Any]], None] | None = None

    def __call__(self) -> dict[str, Any]:
        module = self._module()
        assert module is not None  # the module makes this call
        state = without_own(type(module).__getstate__(module))
        del state[_GETSTATE]
        ours = _numbers(module)
        for name in (*_HOOKS, *_FLAGS):
            state[name] = OrderedDict((number, each) for number, each in state[name].items() if number not in ours)
        state[_HOOKS[0]] = _Guarded(state[_HOOKS[0]], module)
        if self.change is not None:
            self.change(state)
        return state


class _Guarded(OrderedDict[int, Any]):
    """Hooks of a shallow copy, with a guard, which deep copies and pickles leave out."""

    def __init__(self, hooks: OrderedDict[int, Any], module: nn.Module) -> None:
        super().__init__(hooks)
        self[_Guard.NUMBER] = _Guard(module)

    def _without(self) -> OrderedDict[int, Any]:
        return OrderedDict((number, each) for number, each in self.items() if not isinstance(each, _Guard))

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Any]:
        return copy.deepcopy(self._without(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._without().__reduce_ex__(protocol)


class _Guard:
    """A forward pre-hook of a shallow copy, which refuses to run while the original is split."""

    NUMBER = -1  # no other hook has it

    def __init__(self, module: nn.Module) -> None:
        self._original = weakref.ref(module)

    def is_split(self) -> bool:
        original = self._original()
        return original is None or _GETSTATE in vars(original)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.is_split():
            raise AttentionProviderError(
                f"this {type(module).__name__} is a shallow copy of one that is split between ranks, and shares its "
                "submodules. Use the original, or a copy of its own: copy.deepcopy(model)."
            )
