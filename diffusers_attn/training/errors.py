"""What goes wrong in training before anything is trained, by name."""

from __future__ import annotations

from pathlib import Path
from signal import SIGTERM


class TrainingError(ValueError):
    """Settings that cannot be served exactly as given. The message names the setting, what is accepted and what to do.

    What is wrong with the data is a `TrainingDataError` (see `data.errors`), with attention an
    `AttentionProviderError`.
    """


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM came while training.

    Attributes:
        signal: which of them, on any of the processes.
        checkpoint: what was saved behind the last step; None where a second signal left no time for that.
    """

    def __init__(self, signal: int, checkpoint: Path | None) -> None:
        self.signal = signal
        self.checkpoint = checkpoint
        name = "SIGTERM" if signal == SIGTERM else "SIGINT"
        saved = f"go on with --resume latest, from {checkpoint}" if checkpoint else "nothing was saved in the last step"
        super().__init__(f"interrupted by {name}; {saved}.")

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 of SIGINT, 143 of SIGTERM."""
        return 128 + self.signal
