"""One thread at a time: the ranks of a group must make the same exchanges in the same order, and nothing orders those
of two threads alike on all of them.

A thread that begins a forward takes the turn of its model's groups. It need not give it back: another thread that comes
looks whether the first is still within a forward that uses them, on its stack. Forwards within forwards, and what a
backward recomputes in autograd's threads, take no turn away from anyone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import AttentionProviderError


class _Turn:
    """Who exchanges over one group."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """all that use the group."""


_turns: dict[str, _Turn] = {}
_lock = threading.Lock()


def take(groups: Sequence[str], model: nn.Module) -> None:
    """This thread begins a forward of `model` over groups of these names. Next to free for the thread that had the turn
    before.

    Raises:
        AttentionProviderError: another thread is within a forward over one of them. Nothing has been sent.
    """
    thread = threading.get_ident()
    for group in groups:
        turn = _turns.get(group)
        if turn is not None and turn.thread == thread and model in turn.models:
            continue
        with _lock:
            turn = _turns.setdefault(group, _Turn())
            if turn.thread != thread:
                running = _running(turn.thread, turn.models)
                if running is not None:
                    raise _refused(turn.thread, running, model)
            turn.thread = thread
            turn.models.add(model)


def check_idle(groups: Sequence[str], model: nn.Module) -> None:
    """Raises AttentionProviderError where another thread is within a forward over one of these groups."""
    for group in groups:
        turn = _turns.get(group)
        running = None if turn is None or turn.thread == threading.get_ident() else _running(turn.thread, turn.models)
        if turn is not None and running is not None:
            raise _refused(turn.thread, running, model)


def forget(group: str) -> None:
    """It is destroyed."""
    _turns.pop(group, None)


def _running(thread: int, models: Any) -> Any:
    """The model of these that this thread is calling."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in models:
                return module
        frame = frame.f_back
    return None


def _refused(other: int, running: nn.Module, model: nn.Module) -> AttentionProviderError:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return AttentionProviderError(
        f"thread '{threading.current_thread().name}' calls a {type(model).__name__} that shares its sequences between "
        f"ranks, while thread '{names.get(other, other)}' is within a forward of a {type(running).__name__} over the "
        "same ranks. Exchanges of two forwards at once would be taken for each other's. Call the models one after the "
        "other, in the same order on all ranks."
    )
