"""One thread at a time: the ranks of a group must make the same exchanges in the same order, and nothing orders those
of two threads alike on all of them.

A thread that begins a forward takes the turn of its model's groups, and so does one whose backward begins to exchange.
It need not give it back: another thread that comes looks whether the first is still within a forward that uses them, or
within that backward, on its stack. Forwards within forwards, and what a backward recomputes in autograd's threads, take
no turn away from anyone. The backward of a compiled graph comes here through an operator in the graph
(`collectives.depends_on`). What is not seen: a model that is compiled as a whole with `inputs="trust"`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from ...errors import AttentionProviderError
from ...recompute import in_backward_id, stash, stashed

_STASH = "diffusers_attn: thread"


class _Turn:
    """Who exchanges over one group."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """all that use the group."""
        self.backward = -1
        """which backward of this thread exchanges over the group, until it ends."""


_turns: dict[str, _Turn] = {}
_lock = threading.Lock()


def take(groups: Sequence[str], model: nn.Module) -> None:
    """This thread begins a forward of `model` over groups of these names. Next to free for the thread that had the turn
    before.

    Raises:
        AttentionProviderError: another thread is within a forward or a backward over one of them. Nothing has been
            sent.
    """
    thread = _this_thread()
    for group in groups:
        turn = _turns.get(group)
        if turn is not None and turn.thread == thread and model in turn.models:
            continue
        with _lock:
            turn = _turns.setdefault(group, _Turn())
            if turn.thread != thread:
                _check(turn, f"calls a {type(model).__name__}")
                turn.thread, turn.backward = thread, -1
            turn.models.add(model)
            if in_backward_id() == -1:
                stash(thread, _STASH)


def take_in_backward(group: str) -> None:
    """A backward exchanges over the group of this name. Next to free but for the first time in each backward.

    Raises:
        AttentionProviderError: another thread than the one that called the backward is within a forward or a backward
            over the group. Nothing has been sent.
    """
    turn, backward = _turns.get(group), in_backward_id()
    if turn is None or turn.backward == backward:
        return
    with _lock:
        thread = _this_thread()
        if turn.thread != thread:
            _check(turn, "runs a backward of a model")
            turn.thread = thread
        turn.backward = backward
    torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_end_backward, turn, backward))


def _this_thread() -> int:
    """The thread that runs; in a backward the one that called it. On a GPU that one waits meanwhile."""
    own = threading.get_ident()
    if in_backward_id() == -1:
        return own
    called: int | None = stashed(_STASH)
    if called is not None:
        return called
    # It has begun no forward over ranks itself.
    calling = [each for each, frame in sys._current_frames().items() if _calls_backward(frame)]
    return own if own in calling or len(calling) != 1 else calling[0]


def _end_backward(turn: _Turn, backward: int) -> None:
    if turn.backward == backward:
        turn.backward = -1


def check_idle(groups: Sequence[str], model: nn.Module) -> None:
    """Raises AttentionProviderError where another thread is within a forward or a backward over one of these groups."""
    for group in groups:
        turn = _turns.get(group)
        if turn is not None and turn.thread != _this_thread():
            _check(turn, f"calls a {type(model).__name__}")


def forget(group: str) -> None:
    """It is destroyed."""
    _turns.pop(group, None)


def _running(thread: int, models: Any) -> str | None:
    """What this thread is within, where it calls a model of these."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in models:
                return f"a forward of a {type(module).__name__}"
        frame = frame.f_back
    return None


def _in_backward(turn: _Turn) -> str | None:
    """What the thread that has the turn is within, where it is the backward that exchanges over the group."""
    frame = sys._current_frames().get(turn.thread)
    names = ", ".join(sorted({type(model).__name__ for model in turn.models}))
    return f"a backward of a {names}" if turn.backward != -1 and _calls_backward(frame) else None


def _calls_backward(frame: FrameType | None) -> bool:
    """Whether a thread that runs `frame` has called a backward, which has not ended."""
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        frame = frame.f_back
    return False


def _check(turn: _Turn, what: str) -> None:
    """Raises AttentionProviderError if the thread that has the turn is still within what it took it for.

    Args:
        what: this thread does.
    """
    running = _running(turn.thread, turn.models) or _in_backward(turn)
    if running is not None:
        names = {each.ident: each.name for each in threading.enumerate()}
        thread = _this_thread()
        raise AttentionProviderError(
            f"thread '{names.get(thread, thread)}' {what} that shares its sequences between ranks, while thread "
            f"'{names.get(turn.thread, turn.thread)}' is within {running} over the same ranks. The data of two "
            "exchanges at once could be mixed up. Call models and their backwards one after the other, in the same "
            "order on all ranks."
        )
