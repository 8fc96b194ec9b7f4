"""Checkpoints: when they are saved, and which one a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..bounds import NOT_NEGATIVE
from ..setting import setting


@dataclass
class CheckpointSettings:
    """A group of --help, where each setting is explained."""

    HEADING: ClassVar = "checkpoints"

    checkpoint_every: int = setting(
        250, "Number of steps between checkpoints; 0 saves one at the end only", bounds=NOT_NEGATIVE
    )
    checkpoints_kept: int = setting(2, "Number of newest checkpoints to keep; 0 keeps all", bounds=NOT_NEGATIVE)
    resume: str | None = setting(
        None, "Checkpoint to resume from: latest, the number of its step, or its folder (default: start a new run)"
    )
