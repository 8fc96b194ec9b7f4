"""Whose attention runs in this thread: the one thing that dispatch looks at for every call, so it imports nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .streams import Streams


class _Running(threading.local):
    def __init__(self) -> None:
        # No default in the class: Dynamo before PyTorch 2.13 would find that and not look further.
        self.streams: Streams | None = None


running = _Running()


def running_streams() -> Streams | None:
    """The sequences of the model whose attention module runs in this thread; None outside of such modules."""
    return running.streams
