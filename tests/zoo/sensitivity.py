"""Does the output of a model depend on its attention? A test that compares outputs is blind where it does not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_attn.tiny_models.case import Case, Inputs, outputs

_sdpa = F.scaled_dot_product_attention


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One softmax attention call of a forward, and by how much (relative, L2) the output moves if it goes wrong."""

    module: str  # the attention module that was running; for calls outside of any, the innermost module
    has_processor: bool
    zeroed: float  # the call returns zeros
    uniform: float  # the call ignores query and key, and averages the values under its mask


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own an attention processor, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "processor", None) is not None}


def relative_change(result: Any, reference: Any) -> float:
    """L2 norm of the difference of two forward results, relative to the norm of the second one."""
    ours, theirs = (torch.cat([tensor.flatten().double() for tensor in outputs(item)]) for item in (result, reference))
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def attention_sensitivity(case: Case, model: nn.Module) -> list[AttentionCall]:
    """Disturb every attention call of the case's model in turn, and measure the effect on the output.

    The calls are caught at F.scaled_dot_product_attention, where diffusers' native backend and nearly all other
    processors end. Linear attention, flex attention and spelled-out softmax do not get there; of those, the output of
    the whole attention module is zeroed.
    """
    attention = attention_modules(model)
    callers: list[str] = []

    def effect(target: int, disturbed: Callable[..., torch.Tensor]) -> float:
        def sdpa(index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            return (disturbed if index == target else _sdpa)(*args, **kwargs)

        return relative_change(_forward(model, case.inputs(), sdpa), reference)

    with _running_module(model) as running:

        def recorded(_index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
            callers.append(running())
            return _sdpa(*args, **kwargs)

        reference = _forward(model, case.inputs(), recorded)

    calls = [
        AttentionCall(caller, caller in attention, effect(index, _zeros), effect(index, _mean))
        for index, caller in enumerate(callers)
    ]
    for name in [name for name in attention if name not in callers]:
        with _zeroing(attention[name]):
            change = relative_change(model(**case.inputs()), reference)
        calls.append(AttentionCall(name, True, change, change))
    return calls


def _zeros(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(_sdpa(query, key, value, *args, **kwargs))


def _mean(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _sdpa(torch.zeros_like(query), key, value, *args, **kwargs)


def _forward(model: nn.Module, inputs: Inputs, sdpa: Callable[..., torch.Tensor]) -> Any:
    """Run the model; `sdpa(index, query, key, value, ...)` stands in for its attention calls, numbered from 0."""
    count = 0

    def numbered(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        # Callers differ in naming the tensors; hand them on by position.
        tensors = args + tuple(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :])
        return sdpa(count - 1, *tensors, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", numbered):
        return model(**inputs)


@contextlib.contextmanager
def _running_module(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that names the attention module which is running, or else the innermost running module."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    attention = tuple(f"{name}." for name in attention_modules(model))
    handles = []
    for name, module in model.named_modules():
        if not name.startswith(attention):  # what is inside an attention module counts as that module
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield lambda: stack[-1]
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _zeroing(module: nn.Module) -> Iterator[None]:
    def zero(_module: nn.Module, _args: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(torch.zeros_like(item) if isinstance(item, torch.Tensor) else item for item in result)
        return torch.zeros_like(result)

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
