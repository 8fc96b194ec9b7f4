"""Lets only one thread at a time exchange over a process group.

All ranks of a group must make the same exchanges in the same order. If two threads of a rank exchange, their order is
up to the operating system, and may differ between ranks. So the second thread gets an error before it sends anything.

A thread takes the turn of a model's groups when it begins a forward, or when its backward begins to exchange. It does
not give the turn back. Instead, another thread that wants the turn inspects the stack of the first: is it still inside
such a forward or backward? A nested forward, and a recomputation in a thread of autograd, count as the thread that
called them. Compiled graphs call this file through an operator (`collectives.depends_on`): in a backward, and at the
first split of a forward, since the hook that begins the forward of a model that is compiled as a whole is in the graph.
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
    """The thread that may exchange over one group."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """The models that use the group."""
        self.backward = -1
        """Id of the backward of this thread that exchanges over the group; -1 if there is none."""


_turns: dict[str, _Turn] = {}
_lock = threading.Lock()


def take(groups: Sequence[str], model: nn.Module) -> None:
    """Takes the turn of these groups for this thread, which begins a forward of `model`. Costs next to nothing if this
    thread has the turn already.

    Raises:
        AttentionProviderError: another thread is inside a forward or a backward over one of the groups. Nothing has
            been sent.
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


def register(groups: Sequence[str], model: nn.Module) -> None:
    """Notes that `model` uses these groups, for forwards that `take_in_graph` looks for."""
    for group in groups:
        with _lock:
            _turns.setdefault(group, _Turn()).models.add(model)


def take_in_graph(group: str) -> None:
    """Takes the turn of a group for this thread, which runs the forward of a compiled graph.

    Raises:
        AttentionProviderError: another thread is inside a forward or a backward over the group. Nothing has been sent.
    """
    turn = _turns.get(group)
    if turn is not None and turn.thread != threading.get_ident():
        with _lock:
            _check(turn, "calls a compiled model")
            turn.thread, turn.backward = threading.get_ident(), -1


def take_in_backward(group: str) -> None:
    """Takes the turn of a group for the thread that called the running backward. Costs next to nothing after the first
    call in a backward.

    Raises:
        AttentionProviderError: another thread is inside a forward or a backward over the group. Nothing has been sent.
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
    """This thread; in a backward, the thread that called it (autograd runs the backward of a GPU in a thread of its
    own)."""
    own = threading.get_ident()
    if in_backward_id() == -1:
        return own
    called: int | None = stashed(_STASH)
    if called is not None:
        return called
    # The thread that called the backward has begun no forward over ranks.
    calling = [each for each, frame in sys._current_frames().items() if _calls_backward(frame)]
    return own if own in calling or len(calling) != 1 else calling[0]


def _end_backward(turn: _Turn, backward: int) -> None:
    if turn.backward == backward:
        turn.backward = -1


def check_idle(groups: Sequence[str], model: nn.Module) -> None:
    """Raises AttentionProviderError if another thread is inside a forward or a backward over one of these groups."""
    for group in groups:
        turn = _turns.get(group)
        if turn is not None and turn.thread != _this_thread():
            _check(turn, f"calls a {type(model).__name__}")


def forget(group: str) -> None:
    """Removes the turn of a group that is destroyed."""
    _turns.pop(group, None)


def running() -> str | None:
    """A description of the forward or backward over ranks that a thread of this process is inside; None without any."""
    with _lock:
        turns = list(_turns.values())
    return next(filter(None, (_running(each.thread, each.models) or _in_backward(each) for each in turns)), None)


def _running(thread: int, models: Any) -> str | None:
    """A description of the forward of one of `models` that this thread is inside; None if there is none."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in models:
                return f"a forward of a {type(module).__name__}"
        frame = frame.f_back
    return None


def _in_backward(turn: _Turn) -> str | None:
    """A description of the backward that has the turn; None if it has ended."""
    frame = sys._current_frames().get(turn.thread)
    names = ", ".join(sorted({type(model).__name__ for model in turn.models}))
    return f"a backward of a {names}" if turn.backward != -1 and _calls_backward(frame) else None


def _calls_backward(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame is `frame` is inside a call of backward."""
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        frame = frame.f_back
    return False


def _check(turn: _Turn, what: str) -> None:
    """Raises AttentionProviderError if the thread that has the turn still uses it.

    Args:
        what: what this thread wants to do, for the message.
    """
    busy = _running(turn.thread, turn.models) or _in_backward(turn)
    if busy is not None:
        names = {each.ident: each.name for each in threading.enumerate()}
        thread = _this_thread()
        raise AttentionProviderError(
            f"thread '{names.get(thread, thread)}' {what} that shares its sequences between ranks, while thread "
            f"'{names.get(turn.thread, turn.thread)}' is within {busy} over the same ranks. The data of two "
            "exchanges at once could be mixed up. Call models and their backwards one after the other, in the same "
            "order on all ranks."
        )
