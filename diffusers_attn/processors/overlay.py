"""Rebuilds functions so that their own code calls other attention functions.

A function looks up the names that it calls in its globals. So the code of diffusers' processors need not be copied:
their code objects run unchanged, with upstream's fixes, signatures and line numbers, in a copy of their module in which
the attention functions are replaced.
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

from ..providers.native import scaled_dot_product_attention as sdpa
from .reachability import SDPA, calls_attention, classes_named_in, closure_variables, reaches_attention

_serial = itertools.count()


class Overlay:
    """Copies of modules with other attention functions. A module is copied when its first function is rebuilt.

    The copies are snapshots: later assignments to a module's globals do not change them.

    Args:
        dispatch: replaces diffusers' `dispatch_attention_fn`.
        sdpa: replaces `F.scaled_dot_product_attention`.
        redirected: returns a class with rebuilt methods for a class whose methods a function calls by name.
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
            module = _copy_module(vars(module))  # for this function alone, since others may use the class otherwise
        closure = closure_variables(function)
        changed = {name: value for name, value in closure.items() if name in named or self._is_replaced(value)}
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ())) | {
            name: CellType() for name in changed
        }
        rebuilt = _in_module(function, module, tuple(cells.values()) or None)
        self._functions[function] = rebuilt  # before its closure variables, which may refer to it
        for name, value in changed.items():
            cells[name].cell_contents = self._redirected(value) if name in named else self._replacement(value)
        for name in named.keys() & module.__dict__.keys() - changed.keys():
            setattr(module, name, self._redirected(named[name]))
        return rebuilt

    def _add_module(self, original: dict[str, Any]) -> ModuleType:
        module = self._modules[id(original)] = _copy_module(original)
        for name, value in original.items():  # after the copy is recorded, since helpers may call each other
            if self._is_replaced(value):
                setattr(module, name, self._replacement(value))
        return module

    def _is_replaced(self, value: object) -> bool:
        return value is F or value is dispatch_attention_fn or value is sdpa or calls_attention(value)

    def _replacement(self, value: Any) -> Any:
        """The replacement for the value of a global or closure variable."""
        if value is F:
            return self._functional
        if value is dispatch_attention_fn:
            return self._dispatch
        return self._sdpa if value is sdpa else self.rebuild(value)


def with_globals(function: FunctionType, **replaced: Any) -> FunctionType:
    """`function` in a copy of its module, with new values for the globals named in `replaced`."""
    module = _copy_module(function.__globals__)
    module.__dict__.update(replaced)
    return _in_module(function, module, function.__closure__)


def _in_module(function: FunctionType, module: ModuleType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """A copy of `function` with the globals of `module` and another closure.

    Dynamo stores graphs by code object, so it has one of its own: graphs of `function` need the globals of `function`.
    """
    code = function.__code__.replace()
    rebuilt = FunctionType(code, vars(module), function.__name__, function.__defaults__, closure)
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    rebuilt.__qualname__ = function.__qualname__
    rebuilt.__annotations__ = function.__annotations__
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt


def _copy_module(original: dict[str, Any]) -> ModuleType:
    """A copy of a module in `sys.modules`, under a new name.

    Dynamo guards on a global by importing the module named in the function's globals. With a plain dict, or under the
    original's name, functions that call `F.scaled_dot_product_attention` run but do not compile. `__package__` stays,
    for relative imports in functions.
    """
    name = f"_attention_overlay_{next(_serial)}_{original['__name__'].replace('.', '_')}"
    module = ModuleType(name)
    module.__dict__.update(original)
    module.__name__ = name
    module.__spec__ = None
    module.__dict__.pop("__file__", None)  # IPython's autoreload would reload the copy when the file changes
    sys.modules[name] = module
    return module
