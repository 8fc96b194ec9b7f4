"""Run a function's own code with another attention call, by rebuilding it in a copy of its module.

What a function calls is decided by the globals that it looks names up in. So diffusers' processors need not be copied
to make them call something else: their code objects run unchanged (upstream's fixes, signatures and line numbers
included) in an overlay, a copy of their module in which the attention functions are replaced.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

SDPA = "scaled_dot_product_attention"
# `F.scaled_dot_product_attention` may itself have been replaced, by `attention_dispatch`; this is what it was.
sdpa: Callable[..., torch.Tensor] = getattr(torch._C._nn, SDPA)

_serial = itertools.count()


def calls_attention(function: object) -> bool:
    """Whether `function` calls what an overlay replaces, itself or through functions that it names."""
    return isinstance(function, FunctionType) and _calls_attention(function, set())


def _calls_attention(function: FunctionType, visited: set[FunctionType]) -> bool:
    visited.add(function)
    names = set(names_in(function.__code__))
    for value in map(function.__globals__.get, names):
        if value is dispatch_attention_fn or value is sdpa or (value is F and SDPA in names):
            return True
        if isinstance(value, FunctionType) and value not in visited and _calls_attention(value, visited):
            return True
    return False


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that `code` mentions, those of functions defined within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


class Overlay:
    """Modules as they would be with other attention functions, each copied when a function of it is first rebuilt.

    The copies are snapshots: what is assigned to a module's globals later does not reach them.

    Args:
        dispatch: takes the place of diffusers' `dispatch_attention_fn`.
        sdpa: takes the place of `F.scaled_dot_product_attention`.
    """

    def __init__(self, dispatch: Callable[..., torch.Tensor], sdpa: Callable[..., torch.Tensor]) -> None:
        self._dispatch = dispatch
        self._sdpa = sdpa
        self._functional = _copy_module(vars(F))
        setattr(self._functional, SDPA, sdpa)
        self._modules: dict[int, ModuleType] = {}

    def rebuild(self, function: FunctionType) -> FunctionType:
        """`function` with the same code, defaults and closure, in the overlay of its module."""
        module = self._modules.get(id(function.__globals__)) or self._add_module(function.__globals__)
        rebuilt = FunctionType(
            function.__code__, vars(module), function.__name__, function.__defaults__, function.__closure__
        )
        rebuilt.__kwdefaults__ = function.__kwdefaults__
        rebuilt.__qualname__ = function.__qualname__
        rebuilt.__annotations__ = function.__annotations__
        rebuilt.__dict__.update(function.__dict__)
        return rebuilt

    def _add_module(self, original: dict[str, Any]) -> ModuleType:
        module = self._modules[id(original)] = _copy_module(original)
        for name, value in original.items():  # after the copy is known, as helpers may name each other
            if value is F:
                setattr(module, name, self._functional)
            elif value is dispatch_attention_fn:
                setattr(module, name, self._dispatch)
            elif value is sdpa:
                setattr(module, name, self._sdpa)
            elif calls_attention(value):
                setattr(module, name, self.rebuild(value))
        return module


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
