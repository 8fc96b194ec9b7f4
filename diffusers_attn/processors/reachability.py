"""Finds out from code whether a method calls an attention function, directly or indirectly.

Three kinds of calls are followed: functions (globals, and closure variables, as in decorators), methods called through
a class (`Base.__call__(self, ...)`), and methods called through `super()`. Calls through objects (`self.inner(...)`)
cannot be followed.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..providers.native import scaled_dot_product_attention as sdpa

SDPA = "scaled_dot_product_attention"

Visited = set[FunctionType]


def calls_attention(function: object) -> bool:
    """Whether `function` calls attention, itself or through functions and classes that it names."""
    return isinstance(function, FunctionType) and _calls_attention(function, set())


def reaches_attention(cls: type, visited: Visited) -> bool:
    """Whether a method of `cls`, own or inherited, calls attention. Adds the examined functions to `visited`."""
    names = {name for layer in layers(cls) for name in methods_of(layer)}
    return any(_method_reaches(cls, name, None, visited) for name in sorted(names, key="__call__".__ne__))


def layers(cls: type) -> list[type]:
    """`cls` and its base classes in method resolution order, without those of PyTorch."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The functions that `cls` itself defines, including static and class methods."""
    found = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def classes_named_in(function: FunctionType) -> Iterator[tuple[str, type, str, bool]]:
    """The classes whose attributes `function` uses.

    Yields:
        Name of the variable, class, name of the attribute, and whether the function uses the class only for attributes.
    """
    variables = _variables(function)
    if any(isinstance(value, type) for value in variables.values()):
        for variable, attribute, only in _attributes_of_variables(function.__code__):
            value = variables.get(variable)
            if isinstance(value, type):
                yield variable, value, attribute, only


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that `code` uses, including those of functions defined within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def closure_variables(function: FunctionType) -> dict[str, Any]:
    """The closure variables of `function` by name, without the `__class__` that `super()` uses."""
    variables: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        if name != "__class__":
            try:
                variables[name] = cell.cell_contents
            except ValueError:  # the cell is empty
                continue
    return variables


def _variables(function: FunctionType) -> dict[str, Any]:
    """The globals and closure variables of `function`."""
    names = set(names_in(function.__code__))
    used = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return used | closure_variables(function)


def _calls_attention(function: FunctionType, visited: Visited) -> bool:
    visited.add(function)
    for value in _variables(function).values():
        if value is dispatch_attention_fn or value is sdpa or (value is F and SDPA in names_in(function.__code__)):
            return True
        if isinstance(value, FunctionType) and value not in visited and _calls_attention(value, visited):
            return True
    return any(
        only and _method_reaches(cls, attribute, None, visited)
        for _, cls, attribute, only in classes_named_in(function)
    )


def _method_reaches(cls: type, name: str, after: type | None, visited: Visited) -> bool:
    """Whether method `name` of `cls` calls attention. With `after`: the method that `super()` finds in that class."""
    candidates = layers(cls)
    if after is not None:
        candidates = candidates[candidates.index(after) + 1 :]
    for layer in candidates:
        method = methods_of(layer).get(name)
        if method is not None:
            if method in visited:
                return False
            if _calls_attention(method, visited):
                return True
            names = {each for function in _decorated(method, []) for each in names_in(function.__code__)}
            return "super" in names and any(_method_reaches(cls, each, layer, visited) for each in sorted(names))
    return False


def _decorated(function: FunctionType, seen: list[FunctionType]) -> list[FunctionType]:
    """`function` and, recursively, the functions in its closure, such as the one that it decorates."""
    if function not in seen:
        seen.append(function)
        for value in closure_variables(function).values():
            if isinstance(value, FunctionType):
                _decorated(value, seen)
    return seen


@functools.cache
def _attributes_of_variables(code: CodeType) -> list[tuple[str, str, bool]]:
    """Each `variable.attribute` in `code`, and whether the variable is used only for attributes."""
    pairs: list[tuple[str, str | None]] = []
    for instruction, following in itertools.pairwise(dis.get_instructions(code)):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            is_attribute = following.opname in ("LOAD_ATTR", "LOAD_METHOD")
            pairs.append((instruction.argval, following.argval if is_attribute else None))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            pairs += [(variable, attribute if only else None) for variable, attribute, only in
                      _attributes_of_variables(constant)]  # fmt: skip
    other_uses = {variable for variable, attribute in pairs if attribute is None}
    return [(variable, attribute, variable not in other_uses) for variable, attribute in pairs if attribute is not None]
