"""Treats the hooks within models that are split, also those that are registered later."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ....cp_plans.plan import Plan
from ....errors import AttentionProviderError
from ...sequences.tracker import SequenceTracker
from .branches import manager_of, with_state
from .refusal import Split, check_hook
from .registry import class_name, hooks_in, hooks_on, install
from .replacing import restore
from .rules import RULES


class _Watched(NamedTuple):
    split: Split
    tracker: SequenceTracker


_models: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()
"""The models that are split now."""
_fingerprints: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_managers: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""The state manager of models with a cache by branch; None for others. Forgotten together with the fingerprint."""
_with_state: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Whether a model has hooks that may keep a state. Forgotten together with the fingerprint."""


def watch(model: nn.Module, plan: Plan, tracker: SequenceTracker) -> None:
    """Makes the hooks within `model` exact over ranks, and those that are registered within it from now on.

    Raises:
        AttentionProviderError: a hook is refused. Then nothing has changed.
    """
    check(model, plan)
    install(_on_register, _on_remove)
    _models[model] = _Watched(Split.of(model, plan), tracker)
    _forget(model)
    for _, _, hook in hooks_in(model):
        _adapt(hook, tracker)


def unwatch(model: nn.Module) -> None:
    """Restores the hooks within `model`."""
    _forget(model)
    if _models.pop(model, None) is not None:
        for _, _, hook in hooks_in(model):
            restore(hook)


def check(model: nn.Module, plan: Plan) -> None:
    """Raises AttentionProviderError if `model` has a hook that is refused under this plan."""
    split = Split.of(model, plan)
    for path, name, hook in hooks_in(model):
        check_hook(model, split, path, name, hook)


def check_in_graph(model: nn.Module) -> None:
    """Raises AttentionProviderError if `model`, compiled as a whole, has a hook that recognises inputs by their
    address: a graph gives it new copies in every forward."""
    for name, hook in hooks_on(model):
        if type(hook).__name__ == "TextKVCacheTransformerHook":
            raise AttentionProviderError(
                f"{type(model).__name__} has a hook of diffusers, {type(hook).__name__} ('{name}'), which recognises a "
                "prompt by its address. The model is compiled as a whole, so that synchronised inputs have a new "
                "address in every forward. Compile its blocks instead (apply_compile(model)), or set inputs='trust'."
            )


def fingerprint(model: nn.Module) -> str:
    """The hooks within `model`, in words that are the same on ranks with the same hooks; "" for none.

    Ranks may differ: diffusers' fqn="auto" chooses blocks in an order that differs between processes.
    """
    if model not in _fingerprints:
        found = sorted(f"{type(hook).__name__} ('{name}') at '{path}'" for path, name, hook in hooks_in(model))
        digest = hashlib.blake2b("\n".join(found).encode(), digest_size=4).hexdigest()
        _fingerprints[model] = f"{len(found)}, of which the first is {found[0]} (all: {digest})" if found else ""
    return _fingerprints[model]


def cache_by_branch(model: nn.Module) -> Any | None:
    """The state manager of a model's cache, if all hooks within the model keep a state for each branch of guidance."""
    if model not in _fingerprints or model not in _managers:
        fingerprint(model)
        _managers[model] = manager_of(hook for _, _, hook in hooks_in(model))
    return _managers[model]


def keeps_state(model: nn.Module) -> bool:
    """Whether a hook within the model may keep something from one forward to the next."""
    if model not in _fingerprints or model not in _with_state:
        fingerprint(model)
        _with_state[model] = bool(with_state(hook for _, _, hook in hooks_in(model)))
    return _with_state[model]


def _forget(model: nn.Module) -> None:
    for known in (_fingerprints, _managers, _with_state):
        known.pop(model, None)


def _forget_all() -> None:
    for known in (_fingerprints, _managers, _with_state):
        known.clear()


def _adapt(hook: Any, tracker: SequenceTracker) -> None:
    rule = RULES.get(class_name(hook))
    if rule is not None and rule.adapt is not None:
        rule.adapt(hook, tracker)


def _on_register(module: nn.Module, hook: Any, name: str) -> Callable[[], None]:
    """Checks a hook that is about to be registered on a module. Returns what to do afterwards."""
    tracker: SequenceTracker | None = None
    for model, watched in list(_models.items()):
        path = next((path for path, part in model.named_modules() if part is module), None)
        if path is not None:
            check_hook(model, watched.split, path, name, hook)
            tracker = watched.tracker

    def registered() -> None:
        if tracker is not None:
            _adapt(hook, tracker)
            _forget_all()

    return registered


def _on_remove() -> None:
    _forget_all()
