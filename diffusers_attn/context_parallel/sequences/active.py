"""The tracker whose forward runs in this thread. Dispatch reads it in every call, so that this file imports little."""

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
        # Set here rather than in the class: Dynamo before PyTorch 2.13 would read the default in the class.
        self.tracker: SequenceTracker | None = None


active = _Active()
"""`tracker` is that of the split model whose forward runs in this thread; None outside of such a forward."""


def keep_active() -> Callable[[], AbstractContextManager[None]]:
    """Makes the context in which a part of this forward is computed again, see `recompute`."""
    tracker = active.tracker
    if tracker is None:
        return contextlib.nullcontext
    return functools.partial(tracker.recomputing, tracker.state(), tracker.role)
