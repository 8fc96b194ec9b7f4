"""Picks the frames of a video that are used, by their number, or by their time if the frame rate is variable."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import TrainingDataError

PICKS = ("consecutive", "spread")


@dataclass(frozen=True)
class FramePicking:
    """The rule by which frames are picked.

    Attributes:
        fps: frame rate to which videos are resampled. A video with a lower rate repeats frames. None: each video's own
            rate, on average if it is variable.
        pick: "consecutive" picks frames that follow each other at `fps`; "spread" picks frames evenly spaced over the
            entire video, and needs `fps=None`.

    Raises:
        TrainingDataError: a value is not accepted.
    """

    fps: float | None = None
    pick: str = "consecutive"

    def __post_init__(self) -> None:
        if self.pick not in PICKS:
            raise TrainingDataError(f"pick={self.pick!r}: accepted are {', '.join(map(repr, PICKS))}.")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise TrainingDataError(f"fps={self.fps!r}: a positive number is accepted, or None for the video's rate.")
        if self.fps is not None and self.pick == "spread":
            raise TrainingDataError(
                f"pick='spread' spreads the frames over the entire video, so fps={self.fps} has no effect. Leave one "
                "of them out."
            )

    def usable(self, frames: int, fps: float | None, times: Sequence[float] | None = None) -> int:
        """The largest number of frames that can be picked from a video.

        Args:
            frames: number of frames of the video.
            fps: its frame rate; None if unknown.
            times: time of each frame in seconds if the frame rate is variable, else None.

        Raises:
            TrainingDataError: `self.fps` is set and the video's rate is unknown.
        """
        if frames < 1:
            return 0
        if times is None or self.fps is None:
            return int((frames - 1) / self._step(fps) + 1e-6) + 1
        return int((times[-1] - times[0]) * self.fps + 1e-6) + 1

    def numbers(
        self,
        frames: int,
        fps: float | None,
        wanted: int,
        times: Sequence[float] | None = None,
        place: float = 0.5,
    ) -> list[int]:
        """The numbers of `wanted` frames, counted from 0. The other arguments are those of `usable`.

        Args:
            wanted: number of frames.
            place: part of the video that is left out before consecutive frames, as a share of all that is left out: 0
                takes the beginning, 0.5 the middle, 1 the end.

        Raises:
            TrainingDataError: the video has too few frames.
        """
        usable = self.usable(frames, fps, times)
        if wanted > usable:
            raise TrainingDataError(f"it has {usable} usable frames{self._at()}, but {wanted} are needed")
        if times is not None:
            length = times[-1] - times[0]
            if self.pick == "spread":
                gap = length / (wanted - 1) if wanted > 1 else 0.0
            else:
                gap = 1 / self.fps if self.fps else length / (frames - 1)
            first = times[0] + (length - (wanted - 1) * gap) * (0.5 if self.pick == "spread" else place)
            return [_nearest(times, first + i * gap) for i in range(wanted)]
        if self.pick == "spread":
            # From the first frame to the last; a single frame is the middle one.
            return [round(i * (frames - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [frames // 2]
        step = self._step(fps)
        first = (frames - 1 - (wanted - 1) * step) * place
        return [min(max(math.floor(first + i * step + 1e-6), 0), frames - 1) for i in range(wanted)]

    def room(self, frames: int, fps: float | None, wanted: int, times: Sequence[float] | None = None) -> float:
        """Number of frames, at the rate of the picked ones, that `wanted` consecutive frames leave out. Arguments are
        those of `numbers`."""
        if times is None:
            return (frames - 1) / self._step(fps) - (wanted - 1)
        length = times[-1] - times[0]
        return length * (self.fps or (frames - 1) / length) - (wanted - 1)

    def rate(self, frames: int, fps: float | None, wanted: int) -> float | None:
        """Frame rate of the frames that `numbers` picks; None if unknown."""
        if self.fps is not None:
            return self.fps
        if self.pick == "spread" and fps and frames > 1:
            return fps * (wanted - 1) / (frames - 1)
        return fps

    def _step(self, fps: float | None) -> float:
        if self.fps is None:
            return 1.0
        if not fps:
            raise TrainingDataError(
                f"its frame rate is unknown, so it cannot be resampled to {self.fps:g} per second; fps=0 would use the "
                "frames of all videos as they are"
            )
        return fps / self.fps

    def _at(self) -> str:
        return f" at {self.fps:g} per second" if self.fps else ""


def _nearest(times: Sequence[float], moment: float) -> int:
    """The number of the frame whose time is nearest to `moment`; the earlier one of two."""
    after = min(bisect.bisect_left(times, moment - 1e-6), len(times) - 1)
    before = max(after - 1, 0)
    return before if moment - times[before] <= times[after] - moment + 1e-6 else after
