"""Runs a function's own code with another attention call, by rebuilding it in a copy of its module.

A function looks up the names that it calls in its globals. So diffusers' processors need not be copied to call another
attention function: their code objects run unchanged, with upstream's fixes, signatures and line numbers, in an overlay.
An overlay is a copy of their module in which the attention functions are replaced.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from .reachability import SDPA, calls_attention, classes_named_in, held_by, reaches_attention, sdpa

_serial = itertools.count()


class Overlay:
    """Copies of modules with other attention functions. A module is copied when a function of it is first rebuilt.

    The copies are snapshots: later assignments to a module's globals do not change them.

    Args:
        dispatch: takes the place of diffusers' `dispatch_attention_fn`.
        sdpa: takes the place of `F.scaled_dot_product_attention`.
        redirected: gives a class whose methods are rebuilt, for a class that code names in order to call one of them.
    """

    def __init__(
        self,
        dispatch: Callable[..., torch.Tensor],
        sdpa: Callable[..., torch.Tensor],
        redirected: Callable[[type], type],
    ) -> None:
        self._dispatch = dispatch
        self._sdpa = sdpa
        self._redirected = redirected
        self._functional = _copy_module(vars(F))
        setattr(self._functional, SDPA, sdpa)
        self._modules: dict[int, ModuleType] = {}
        self._functions: dict[FunctionType, FunctionType] = {}

    def rebuild(self, function: FunctionType) -> FunctionType:
        """`function` with the same code and defaults, in the overlay of its module."""
        if function in self._functions:
            return self._functions[function]
        module = self._modules.get(id(function.__globals__)) or self._add_module(function.__globals__)
        named = {
            name: cls for name, cls, _, only in classes_named_in(function) if only and reaches_attention(cls, set())
        }
        if named.keys() & module.__dict__.keys():
            module = _copy_module(vars(module))  # for this function, as others may use the class for something else
        held = {name: value for name, value in held_by(function).items() if name in named or self._replaces(value)}
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ())) | {
            name: CellType() for name in held
        }
        rebuilt = _in_module(function, module, tuple(cells.values()) or None)
        self._functions[function] = rebuilt  # before its parts, which may name it
        for name, value in held.items():
            cells[name].cell_contents = self._redirected(value) if name in named else self._instead_of(value)
        for name in named.keys() & module.__dict__.keys() - held.keys():
            setattr(module, name, self._redirected(named[name]))
        return rebuilt

    def _add_module(self, original: dict[str, Any]) -> ModuleType:
        module = self._modules[id(original)] = _copy_module(original)
        for name, value in original.items():  # after the copy is known, as helpers may name each other
            if self._replaces(value):
                setattr(module, name, self._instead_of(value))
        return module

    def _replaces(self, value: object) -> bool:
        return value is F or value is dispatch_attention_fn or value is sdpa or calls_attention(value)

    def _instead_of(self, value: Any) -> Any:
        """The replacement for the value of a global or closure variable."""
        if value is F:
            return self._functional
        if value is dispatch_attention_fn:
            return self._dispatch
        return self._sdpa if value is sdpa else self.rebuild(value)


def with_globals(function: FunctionType, **replaced: Any) -> FunctionType:
    """`function` with the same code, in a copy of its module in which the globals named in `replaced` have other
    values."""
    module = _copy_module(function.__globals__)
    module.__dict__.update(replaced)
    return _in_module(function, module, function.__closure__)


def _in_module(function: FunctionType, module: ModuleType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """`function` with the globals of `module` and another closure, and otherwise the same."""
    rebuilt = FunctionType(function.__code__, vars(module), function.__name__, function.__defaults__, closure)
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    rebuilt.__qualname__ = function.__qualname__
    rebuilt.__annotations__ = function.__annotations__
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt


def _copy_module(original: dict[str, Any]) -> ModuleType:
    """A module with the same globals, which Dynamo can find again.

    Dynamo guards on a global by importing the module named in the function's globals: so the copy is a real module, in
    `sys.modules`, under a name of its own. With a plain dict, or under the original's name, what calls
    `F.scaled_dot_product_attention` runs but does not compile. `__package__` stays, for relative imports in functions.
    """
    name = f"_attention_overlay_{next(_serial)}_{original['__name__'].replace('.', '_')}"
    module = ModuleType(name)
    module.__dict__.update(original)
    module.__name__ = name
    module.__spec__ = None
    module.__dict__.pop("__file__", None)  # IPython's autoreload would reload the copy when the file changes
    sys.modules[name] = module
    return module
