"""Finds out from code whether calling a method reaches an attention function.

Three kinds of calls are followed: functions (globals, and closure variables, as in decorators), methods of a class that
the code names (`Base.__call__(self, ...)`), and methods of the next class (`super().__call__(...)`). Calls through
objects (`self.inner(...)`) cannot be followed.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

SDPA = "scaled_dot_product_attention"
# `F.scaled_dot_product_attention` may itself have been replaced, by `attention_dispatch`; this is what it was.
sdpa: Callable[..., torch.Tensor] = getattr(torch._C._nn, SDPA)

Visited = set[FunctionType]


def calls_attention(function: object) -> bool:
    """Whether `function` calls what an overlay replaces, itself or through functions and classes that it names."""
    return isinstance(function, FunctionType) and _calls_attention(function, set())


def reaches_attention(cls: type, visited: Visited) -> bool:
    """Whether a method of `cls`, own or inherited, calls attention. The functions that were looked at are added to
    `visited`."""
    names = {name for layer in layers(cls) for name in methods_of(layer)}
    return any(_method_reaches(cls, name, None, visited) for name in sorted(names, key="__call__".__ne__))


def layers(cls: type) -> list[type]:
    """`cls` and its base classes in the order of method resolution, without those of PyTorch."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The functions that `cls` itself defines, static and class methods included."""
    found = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def classes_named_in(function: FunctionType) -> Iterator[tuple[str, type, str, bool]]:
    """The classes of which `function` names an attribute: variable, class, attribute, and whether it uses the class for
    nothing else."""
    variables = _variables(function)
    if any(isinstance(value, type) for value in variables.values()):
        for variable, attribute, only in _attributes_of_variables(function.__code__):
            value = variables.get(variable)
            if isinstance(value, type):
                yield variable, value, attribute, only


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that `code` mentions, those of functions defined within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def held_by(function: FunctionType) -> dict[str, Any]:
    """What the closure of `function` holds, by the variable's name."""
    held: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        if name != "__class__":  # of `super()`
            try:
                held[name] = cell.cell_contents
            except ValueError:  # nothing yet
                continue
    return held


def _variables(function: FunctionType) -> dict[str, Any]:
    """The globals that `function` mentions, and what its closure holds."""
    names = set(names_in(function.__code__))
    return {name: function.__globals__[name] for name in names if name in function.__globals__} | held_by(function)


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


def _method_reaches(cls: type, name: str, behind: type | None, visited: Visited) -> bool:
    """Whether method `name` of `cls` calls attention: the first, or the one that `super()` means in class `behind`."""
    below = layers(cls)
    if behind is not None:
        below = below[below.index(behind) + 1 :]
    for layer in below:
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
    """`function`, and the functions that its closure and theirs hold: what it decorates."""
    if function not in seen:
        seen.append(function)
        for value in held_by(function).values():
            if isinstance(value, FunctionType):
                _decorated(value, seen)
    return seen


@functools.cache
def _attributes_of_variables(code: CodeType) -> list[tuple[str, str, bool]]:
    """Each `variable.attribute` in `code`, and whether the variable is used for attributes only."""
    pairs: list[tuple[str, str | None]] = []
    for this, then in itertools.pairwise(dis.get_instructions(code)):
        if this.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            is_attribute = then.opname in ("LOAD_ATTR", "LOAD_METHOD")
            pairs.append((this.argval, then.argval if is_attribute else None))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            pairs += [(variable, attribute if only else None) for variable, attribute, only in
                      _attributes_of_variables(constant)]  # fmt: skip
    otherwise = {variable for variable, attribute in pairs if attribute is None}
    return [(variable, attribute, variable not in otherwise) for variable, attribute in pairs if attribute is not None]
