"""Checks that modules with hooks of a plan run within a call of their model.

`model.forward(...)` runs no hooks of the model itself. Its inputs are then neither split nor compared between ranks,
and attention calls have no tracker, while hooks on the modules inside go on splitting and gathering. So these hooks
check first, and raise before anything is sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import AttentionProviderError
from ...recompute import in_backward_id
from ...tracing.errors import raise_error
from ..sequences.tracker import SequenceTracker


class _Hook(Protocol):
    tracker: SequenceTracker
    path: str
    """Name of the module in the model."""


def check_called(hook: _Hook, module: nn.Module) -> None:
    """Checks that a call of the model is running, or a backward, which may compute a part of it again.

    Args:
        hook: the hook that makes the check. Only the error reads its path: a compiler would make a graph for each path.
        module: the module that has the hook.

    Raises:
        AttentionProviderError: no call of the model is running in this thread.
    """
    if torch.compiler.is_compiling():
        # Dynamo does not recognise the tracker that this graph has put into thread-local storage.
        called = hook.tracker.has_begun
    else:
        called = hook.tracker.is_running or in_backward_id() != -1
    if not called:
        raise_error(_not_called, hook, module)


def _not_called(hook: _Hook, module: nn.Module) -> AttentionProviderError:
    return not_called(hook.tracker, f"'{hook.path}' ({type(module).__name__}) in it")


def not_called(tracker: SequenceTracker, part: str) -> AttentionProviderError:
    """The error for a part of a model that ran outside of a call of the model."""
    return AttentionProviderError(
        f"a {tracker.model} is split between ranks, and {part} ran outside of a call of the model. model.forward(...) "
        "runs no hooks of the model, which split its inputs and compare them between ranks: call model(...) instead. "
        "To run a part of it by itself, call disable_context_parallel(model) first (or "
        "remove_context_parallel(model), where a plan was applied)."
    )


def hooks_of(
    module: nn.Module, path: str, spec: None, tracker: SequenceTracker, name: str
) -> Iterator[Callable[[], RemovableHandle]]:
    """A hook that makes this check alone, for models whose plan sets no hook on a module within them."""
    yield functools.partial(module.register_forward_pre_hook, CheckCalled(tracker, name))


class CheckCalled:
    """A forward pre-hook that makes this check."""

    def __init__(self, tracker: SequenceTracker, path: str) -> None:
        self.tracker, self.path = tracker, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        check_called(self, module)
