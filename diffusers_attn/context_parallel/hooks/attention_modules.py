"""Recognises modules that compute attention, by the names in their code.

A module that computes attention is watched while it runs over split tokens: its calls must come through this library,
or else they would attend to this rank's tokens only (`words/attention.py`). A module with a `processor` is an attention
module. Others are recognised by their `forward`, and the methods and functions that it names: an attention kernel, or a
softmax beside a matrix product. Attention of other kinds, such as one that is linear in the tokens, is not recognised.
"""

from __future__ import annotations

import contextlib
import dis
import functools
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from ...errors import AttentionProviderError

_KERNELS = frozenset(
    "scaled_dot_product_attention dispatch_attention_fn attention_dispatch flex_attention multi_head_attention_forward "
    "memory_efficient_attention flash_attn_func flash_attn_varlen_func flash_attn_qkvpacked_func "
    "flash_attn_varlen_qkvpacked_func sageattn sageattn_varlen".split()
)
_PRODUCTS = frozenset("@ matmul bmm baddbmm einsum".split())
_SOFTMAX = frozenset("softmax Softmax log_softmax".split())
_NOT_FOLLOWED = frozenset("torch numpy math typing functools contextlib itertools inspect logging warnings".split())
_OF_TORCH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of PyTorch that may attend by one fused kernel, depending on PyTorch's settings."""
_PLAIN = (nn.Module, Tensor, str, bytes, int, float, bool, type(None), dict, list, tuple, set, frozenset, type)


def is_attention(module: nn.Module) -> bool:
    """Whether `module` computes attention itself, not only a module inside it."""
    if hasattr(module, "processor") or isinstance(module, _OF_TORCH):
        return True
    cls: type = type(module)
    if cls.__module__.partition(".")[0] == "torch":
        return False
    return _class_attends(cls) or any(
        _called_attends(value, cls) for value in vars(module).values() if not isinstance(value, _PLAIN)
    )


def attention_elsewhere(model: nn.Module) -> AttentionProviderError | None:
    """The error for a forward of `model` whose tokens were split and that made no attention call here.

    None if no code of the model has a softmax. None too if the model has attention modules: hooks watch each of these,
    and a cache may skip them all.
    """
    if any(map(is_attention, model.modules())):
        return None
    found = {f"'{name}' ({type(module).__name__})": None for name, module in model.named_modules() if _weighs(module)}
    if not found:
        return None
    return AttentionProviderError(
        f"tokens of this {type(model).__name__} were split between ranks, and no attention call came to "
        "diffusers_attn. Attention that the model computes in another way sees this rank's tokens only. Code with a "
        f"softmax is in {', '.join(found)}. Let it call diffusers_attn.attention_dispatch; or, if it needs no tokens "
        "of other ranks, say so in the plan: "
        f'"{next(iter(found)).split(chr(39))[1]}": CPAttention((), key=()).'
    )


def _weighs(module: nn.Module) -> bool:
    """Whether a module is a softmax, or has one in its code."""
    if isinstance(module, nn.Softmax):
        return True
    forward = getattr(type(module), "forward", None)
    is_of_torch = type(module).__module__.partition(".")[0] == "torch"
    return not is_of_torch and isinstance(forward, FunctionType) and bool(_names(forward, type(module)) & _SOFTMAX)


@functools.cache
def _class_attends(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    return isinstance(forward, FunctionType) and _attends(forward, cls)


def _called_attends(value: Any, of: type) -> bool:
    """Whether an attribute of a module of class `of` is a function, or an object with methods, that attends."""
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ in _KERNELS
    if isinstance(value, FunctionType):
        return value.__name__ in _KERNELS or _attends(value, None)
    kind: type = type(value)
    return _object_attends(kind, of)


@functools.cache
def _object_attends(cls: type, of: type) -> bool:
    if cls.__module__.partition(".")[0] in ("builtins", "torch", "functools"):
        return False
    forward = getattr(of, "forward", None)
    named = {"__call__", *names_in(forward.__code__)} if isinstance(forward, FunctionType) else {"__call__"}
    methods = [each for name in named if isinstance(each := getattr(cls, name, None), FunctionType)]
    return any(_attends(each, cls) for each in methods)


def _attends(function: FunctionType, cls: type | None) -> bool:
    """Whether `function`, or a function that it calls, names a kernel, or a softmax and a matrix product."""
    names = _names(function, cls)
    return bool(names & _KERNELS) or bool(names & _SOFTMAX and names & _PRODUCTS)


def _names(function: FunctionType, cls: type | None) -> set[str]:
    """The globals and attributes that `function` mentions, and those that the functions it calls mention: functions of
    `cls`, its module and its closure. A function under an alias counts under its own name too."""
    names: set[str] = set()
    visited: set[FunctionType] = set()
    waiting = [function]
    while waiting:
        function = waiting.pop()
        if function not in visited:
            visited.add(function)
            own = set(names_in(function.__code__))
            names |= own
            for each in _mentioned(function, own, cls):
                if isinstance(each, (FunctionType, BuiltinFunctionType)):
                    names.add(each.__name__)
                if isinstance(each, FunctionType) and (each.__module__ or "").partition(".")[0] not in _NOT_FOLLOWED:
                    waiting.append(each)
    return names


def _mentioned(function: FunctionType, names: set[str], cls: type | None) -> Iterator[Any]:
    """What `function` may call, from its module, modules that it names, its class and its closure."""
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        yield value
        if isinstance(value, ModuleType):
            yield from (vars(value)[each] for each in names & vars(value).keys())
    if cls is not None:
        yield from (getattr(cls, name, None) for name in names)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # still empty
            yield cell.cell_contents


def names_in(code: CodeType) -> Iterator[str]:
    """The globals and attributes that `code` and the functions inside it mention, and "@" for a matrix product."""
    yield from code.co_names
    yield from ("@" for each in dis.get_instructions(code) if each.opname == "BINARY_OP" and each.argrepr[0] == "@")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
