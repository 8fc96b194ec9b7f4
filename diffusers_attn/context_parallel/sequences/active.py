"""Whose attention runs in this thread: what dispatch looks at for every call, so that it imports nothing heavy."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tracker import SequenceTracker


class _Active(threading.local):
    def __init__(self) -> None:
        # No default in the class: Dynamo before PyTorch 2.13 would find that and not look further.
        self.tracker: SequenceTracker | None = None


active = _Active()


def active_tracker() -> SequenceTracker | None:
    """The sequences of the model to which a plan is applied and whose forward runs in this thread; None outside."""
    return active.tracker


def keep_active() -> Callable[[], AbstractContextManager[None]]:
    """What makes the context in which a part of this thread's forward is computed again; see `recompute`."""
    tracker = active.tracker
    if tracker is None:
        return contextlib.nullcontext
    return functools.partial(tracker.again, tracker.state(), tracker.role)
