"""SIGINT (Ctrl-C) and SIGTERM end a run after the steps that are launched, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from ..errors import TrainingInterrupted
from ..job_ranks import JobRanks

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
    received: list[int] = []
    received_at = 0.0
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def handle(number: int, frame: object) -> None:
        nonlocal received_at
        now = time.monotonic()
        if received:
            if launched and now - received_at < FORWARDED:
                return
            raise TrainingInterrupted(number, None)
        received.append(number)
        received_at = now
        if os.environ.get("RANK", "0") == "0":  # os.write, since the signal may have interrupted a print
            os.write(
                2, b"\ninterrupted: saving a checkpoint after the running steps. Interrupt again to exit at once.\n"
            )

    handlers = {}
    try:
        for number in SIGNALS:
            handlers[number] = signal.signal(number, handle)
    except ValueError:  # only the main thread can set handlers
        yield lambda: 0
        return
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Interruption:
    """The signal that ends a run on all processes, whichever of them received it.

    Attributes:
        number: the signal, the same on all processes; 0 for none.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: JobRanks) -> None:
        self.number = 0
        self._ranks = ranks
        self._received: Callable[[], int] = lambda: 0

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this context, signals are recorded; see `interruptible`."""
        with interruptible() as self._received:
            yield

    def received(self) -> list[float]:
        """For each of `SIGNALS`, 1 if this process has received it, else 0. Their sums over all processes are for
        `note`."""
        signal = self._received()
        return [float(signal == each) for each in SIGNALS]

    def note(self, counts: list[float]) -> None:
        """Takes note of a signal, by the number of processes that have received each."""
        self.number = self.number or next((each for each, count in zip(SIGNALS, counts) if count), 0)

    def exchange(self) -> int:
        """Takes note of what all processes have received until now. All must call this; it waits for the device."""
        self.note(self._ranks.sum(self.received()))
        return self.number
