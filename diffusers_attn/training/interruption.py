"""SIGINT (Ctrl-C) and SIGTERM end a run after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from .errors import TrainingInterrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORWARDED = 2.0
"""Seconds within which a second signal counts as the first. A terminal sends Ctrl-C to a launcher and to its processes,
and the launcher forwards it to them."""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Records the first SIGINT or SIGTERM within this context. Yields a function that returns its number, or 0.

    Raises:
        TrainingInterrupted: a second signal arrived; it ends the run at once.
    """
    came: list[int] = []
    at = 0.0
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, frame: object) -> None:
        nonlocal at
        now = time.monotonic()
        if came:
            if launched and now - at < FORWARDED:
                return
            raise TrainingInterrupted(number, None)
        came.append(number)
        at = now
        if os.environ.get("RANK", "0") == "0":  # and not print, which this may have interrupted
            os.write(2, b"\ninterrupted: a checkpoint is saved behind this step. Again, to leave at once.\n")

    before = {}
    try:
        for number in SIGNALS:
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread, which alone may do this
        yield lambda: 0
        return
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
