"""Buckets: the sizes to which examples are resized, so that all examples of a batch have one size.

The buckets of diffusers' training_utils are not used: they support images of one square area only, may exceed that
area, and compare aspect ratios in a way that prefers small buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .errors import TrainingDataError
from .frames import FramePicking

if TYPE_CHECKING:
    from .examples import Example

ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
"""Default aspect ratios, width / height: those of cameras and screens, upright and landscape."""


class Bucket(NamedTuple):
    """A size in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Buckets:
    """The sizes that a model is trained on.

    Attributes:
        sizes: (height, width) in pixels. An example gets the largest area that it need not be enlarged for beyond
            `max_upscale`. Areas that differ by less than 30 % count as equal.
        frames: numbers of frames. Images go to 1, videos to the largest number that they have.
        max_upscale: largest factor by which an example may be enlarged; 1.0 means not at all.
        picking: rule by which frames of a video are picked.

    Raises:
        TrainingDataError: there are no sizes or frames, or they are not positive.
    """

    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...] = (1,)
    max_upscale: float = 1.25
    picking: FramePicking = field(default_factory=FramePicking)

    def __post_init__(self) -> None:
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise TrainingDataError(
                f"sizes={self.sizes!r}: one or more pairs (height, width) in pixels, from 1, are accepted."
            )
        if not self.frames or min(self.frames) < 1:
            raise TrainingDataError(f"frames={self.frames!r}: one or more numbers from 1 are accepted.")
        if not self.max_upscale > 0:
            raise TrainingDataError(
                f"max_upscale={self.max_upscale!r}: a factor above 0 is accepted; 1.0 allows no enlarging."
            )

    @staticmethod
    def of(
        area: int | Sequence[int],
        *,
        multiple: int = 16,
        aspects: Sequence[float] = ASPECTS,
        frames: Sequence[int] = (1,),
        frame_rule: tuple[int, int] = (1, 0),
        max_upscale: float = 1.25,
        picking: FramePicking | None = None,
    ) -> Buckets:
        """Buckets for all combinations of areas and aspect ratios.

        Args:
            area: number of pixels of a frame, or several such numbers. Buckets have approximately this area.
            multiple: number that heights and widths are multiples of: the VAE's scale factor times the patch size.
            aspects: aspect ratios, width / height.
            frames: numbers of frames.
            frame_rule: (step, offset): numbers of frames must be a multiple of step, plus offset; (4, 1) is 4n + 1.
            max_upscale: largest factor by which an example may be enlarged.
            picking: rule by which frames of a video are picked. None: consecutive frames at the video's own rate.

        Raises:
            TrainingDataError: a number of frames does not follow the rule (the message has the nearest that do), or
                another value is not accepted.
        """
        areas = (area,) if isinstance(area, int) else tuple(area)
        if multiple < 1 or not areas or min(areas) < multiple**2:
            raise TrainingDataError(
                f"area={area!r}, multiple={multiple}: one or more areas of at least {multiple}x{multiple} pixels are "
                "accepted."
            )
        if not aspects or min(aspects) <= 0:
            raise TrainingDataError(
                f"aspects={tuple(aspects)!r}: one or more ratios width / height above 0 are accepted."
            )
        for number in frames:
            check_frames(number, frame_rule)
        sizes = dict.fromkeys(_size(each, aspect, multiple) for each in areas for aspect in aspects)
        return Buckets(tuple(sizes), tuple(frames), max_upscale, picking or FramePicking())

    def bucket(self, example: Example) -> Bucket:
        """The bucket of an example.

        It has the largest area that needs no enlarging beyond `max_upscale`, the nearest aspect ratio of that area,
        and the largest number of frames that the example has.

        Raises:
            TrainingDataError: the example is too small or too short for all buckets, or there are no buckets for
                images or for videos.
        """
        frames = self._frames(example)
        by_area = sorted(self.sizes, key=lambda size: (-size[0] * size[1], size))
        needed = math.inf
        while by_area:
            # Rounding to a multiple makes areas differ that are meant to be equal, small ones by a sixth.
            least = by_area[0][0] * by_area[0][1] * 0.7
            group = [size for size in by_area if size[0] * size[1] >= least]
            by_area = by_area[len(group) :]
            size = min(
                group, key=lambda size: (abs(math.log(size[1] * example.height / size[0] / example.width)), size)
            )
            scale = cover_scale(example.height, example.width, *size)
            if scale <= self.max_upscale:
                return Bucket(frames, *size)
            needed = min(needed, scale)
        raise TrainingDataError(
            f"{example.width}x{example.height} pixels would have to be enlarged {needed:.2f} times, but max_upscale is "
            f"{self.max_upscale:g}"
        )

    def numbers(self, example: Example, bucket: Bucket) -> list[int]:
        """The numbers of the frames of `example` that are used in `bucket`."""
        if example.kind == "image":
            return [0]
        return self.picking.numbers(example.frames, example.fps, bucket.frames, example.times, example.place)

    def _frames(self, example: Example) -> int:
        accepted = ", ".join(map(str, sorted(self.frames)))
        if example.kind == "image":
            if 1 not in self.frames:
                raise TrainingDataError(
                    f"an image, but buckets have {accepted} frames. Add 1 to `frames` to train on both, or leave it out"
                )
            return 1
        video_lengths = [number for number in self.frames if number > 1]
        if not video_lengths:
            raise TrainingDataError(
                "a video, but buckets have single frames. Leave it out, save one of its frames as an image, or, for a "
                "video model, set larger `frames`"
            )
        usable = self.picking.usable(example.frames, example.fps, example.times)
        fitting = [number for number in video_lengths if number <= usable]
        if not fitting:
            at = f" at {self.picking.fps:g} per second" if self.picking.fps else ""
            raise TrainingDataError(f"it has {usable} usable frames{at}, but buckets have {accepted} frames")
        return max(fitting)


def check_frames(frames: int, frame_rule: tuple[int, int]) -> None:
    """Raises a `TrainingDataError` unless `frames` is a multiple of the rule's step, plus its offset."""
    step, offset = frame_rule
    if step < 1:
        raise TrainingDataError(f"frame_rule={frame_rule!r}: (step, offset) with a step from 1 is accepted.")
    if frames >= 1 and (frames - offset) % step == 0:
        return
    below = (frames - offset) // step * step + offset
    near = " or ".join(str(number) for number in (below, below + step) if number >= 1)
    raise TrainingDataError(f"frames={frames}: the model accepts {step}n + {offset} frames, such as {near}.")


def cover_scale(height: int, width: int, to_height: int, to_width: int) -> float:
    """Factor by which `height` x `width` is enlarged to cover `to_height` x `to_width`."""
    return max(to_height / height, to_width / width)


def _size(area: int, aspect: float, multiple: int) -> tuple[int, int]:
    """The (height, width) in multiples of `multiple` whose aspect ratio and area are nearest to the given ones."""
    if aspect < 1:  # an upright size is a landscape size, transposed
        width, height = _size(area, 1 / aspect, multiple)
        return height, width
    exact = (math.sqrt(area / aspect), math.sqrt(area * aspect))
    heights, widths = (
        {max(multiple, side // multiple * multiple), math.ceil(side / multiple) * multiple} for side in map(int, exact)
    )

    def distance(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        # Another aspect ratio crops a part of every example; another area only costs time.
        aspect_error, area_error = math.log(size[1] / size[0] / aspect), math.log(size[0] * size[1] / area)
        return 2 * abs(aspect_error) + abs(area_error), size

    return min(((height, width) for height in heights for width in widths), key=distance)
