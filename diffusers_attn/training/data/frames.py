"""Which frames of a video are taken: as many as its bucket has, at a rate of frames that the model knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import TrainingDataError

PICKS = ("consecutive", "spread")


@dataclass(frozen=True)
class FramePicking:
    """How frames are picked.

    Attributes:
        fps: the rate at which they follow each other in what is trained on. None takes the video's own. A video that
            has fewer repeats some.
        pick: "consecutive" takes frames that follow each other (at `fps`), from the middle of the video; "spread"
            takes them evenly from all of it, whatever its length, and `fps` must be None.

    Raises:
        TrainingDataError: not one of these.
    """

    fps: float | None = None
    pick: str = "consecutive"

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise TrainingDataError(f"pick={self.pick!r}; it is one of {', '.join(map(repr, PICKS))}.")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise TrainingDataError(f"fps={self.fps!r}; it is a positive number, or None for the video's own rate.")
        if self.fps is not None and self.pick == "spread":
            raise TrainingDataError(
                f"pick='spread' takes frames from all of the video, and then fps={self.fps} cannot be kept. Leave one "
                "of them out."
            )

    def usable(self, frames: int, fps: float | None) -> int:
        """How many frames a video of `frames` at `fps` per second gives at most.

        Raises:
            TrainingDataError: a rate is asked for and the video's own is not known.
        """
        return int((frames - 1) / self._step(fps) + 1e-6) + 1 if frames > 0 else 0

    def numbers(self, frames: int, fps: float | None, wanted: int) -> list[int]:
        """The numbers of `wanted` frames, counted from 0, of a video of `frames` at `fps` per second.

        Raises:
            TrainingDataError: it has fewer than that.
        """
        usable = self.usable(frames, fps)
        if wanted > usable:
            raise TrainingDataError(f"it gives {usable} frames{self._at()}, and {wanted} are wanted")
        if self.pick == "spread":
            # From the first to the last; of one, the middle.
            return [round(i * (frames - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [frames // 2]
        step = self._step(fps)
        first = (frames - 1 - (wanted - 1) * step) / 2
        return [min(max(math.floor(first + i * step + 1e-6), 0), frames - 1) for i in range(wanted)]

    def _step(self, fps: float | None) -> float:
        if self.fps is None:
            return 1.0
        if not fps:
            raise TrainingDataError(f"{self.fps:g} frames per second are asked for, and its own rate is not known")
        return fps / self.fps

    def _at(self) -> str:
        return f" at {self.fps:g} per second" if self.fps else ""
