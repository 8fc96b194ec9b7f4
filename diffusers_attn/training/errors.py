"""Errors of the trainer."""

from __future__ import annotations

from pathlib import Path
from signal import SIGTERM


class TrainingError(ValueError):
    """A setting cannot be used exactly as given. The message names the setting, accepted values and what to do.

    Problems with the data raise `TrainingDataError` (see `data.errors`); problems with attention raise
    `AttentionProviderError`.
    """


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM arrived during training.

    Attributes:
        signal: number of the signal that arrived on any of the processes.
        checkpoint: checkpoint saved after the last step; None if a second signal prevented it.
    """

    def __init__(self, signal: int, checkpoint: Path | None) -> None:
        self.signal = signal
        self.checkpoint = checkpoint
        name = "SIGTERM" if signal == SIGTERM else "SIGINT"
        saved = f"resume from {checkpoint} with --resume latest" if checkpoint else "the last step was not saved"
        super().__init__(f"interrupted by {name}; {saved}.")

    @property
    def exit_code(self) -> int:
        """Exit status by shell convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal
