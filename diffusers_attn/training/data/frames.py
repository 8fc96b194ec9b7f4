"""Which frames of a video are taken: as many as its bucket has, at a rate of frames that the model knows.

Frames of a video whose rate varies are picked by the times at which they are shown, those of others by their numbers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import TrainingDataError

PICKS = ("consecutive", "spread")


@dataclass(frozen=True)
class FramePicking:
    """How frames are picked.

    Attributes:
        fps: the rate at which they follow each other in what is trained on. None takes the video's own, on average
            where it varies. A video that has fewer repeats some.
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

    def usable(self, frames: int, fps: float | None, times: Sequence[float] | None = None) -> int:
        """How many frames a video gives at most.

        Args:
            frames: that it has.
            fps: of them per second.
            times: where its rate varies, when each is shown, in seconds.

        Raises:
            TrainingDataError: a rate is asked for and the video's own is not known.
        """
        if frames < 1:
            return 0
        if times is None or self.fps is None:
            return int((frames - 1) / self._step(fps) + 1e-6) + 1
        return int((times[-1] - times[0]) * self.fps + 1e-6) + 1

    def numbers(self, frames: int, fps: float | None, wanted: int, times: Sequence[float] | None = None) -> list[int]:
        """The numbers of `wanted` frames, counted from 0. The other arguments are those of `usable`.

        Raises:
            TrainingDataError: it has fewer than that.
        """
        usable = self.usable(frames, fps, times)
        if wanted > usable:
            raise TrainingDataError(f"it gives {usable} frames{self._at()}, and {wanted} are wanted")
        if times is not None:
            length = times[-1] - times[0]
            if self.pick == "spread":
                gap = length / (wanted - 1) if wanted > 1 else 0.0
            else:
                gap = 1 / self.fps if self.fps else length / (frames - 1)
            first = times[0] + (length - (wanted - 1) * gap) / 2
            return [_nearest(times, first + i * gap) for i in range(wanted)]
        if self.pick == "spread":
            # From the first to the last; of one, the middle.
            return [round(i * (frames - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [frames // 2]
        step = self._step(fps)
        first = (frames - 1 - (wanted - 1) * step) / 2
        return [min(max(math.floor(first + i * step + 1e-6), 0), frames - 1) for i in range(wanted)]

    def rate(self, frames: int, fps: float | None, wanted: int) -> float | None:
        """Of what `numbers` picks, the frames per second; None where it is not known."""
        if self.fps is not None:
            return self.fps
        if self.pick == "spread" and fps and frames > 1:
            return fps * (wanted - 1) / (frames - 1)
        return fps

    def _step(self, fps: float | None) -> float:
        if self.fps is None:
            return 1.0
        if not fps:
            raise TrainingDataError(f"{self.fps:g} frames per second are asked for, and its own rate is not known")
        return fps / self.fps

    def _at(self) -> str:
        return f" at {self.fps:g} per second" if self.fps else ""


def _nearest(times: Sequence[float], moment: float) -> int:
    """The number of the frame that is shown nearest to this moment; of two, the earlier."""
    after = min(bisect.bisect_left(times, moment - 1e-6), len(times) - 1)
    before = max(after - 1, 0)
    return before if moment - times[before] <= times[after] - moment + 1e-6 else after
