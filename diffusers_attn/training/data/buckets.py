"""Sizes to which examples are brought, so that those of a batch are of one size: by aspect, area and frames.

What diffusers' training_utils has for this knows pictures of square areas only, may exceed the area, and compares
aspects in a way that favours small buckets; with frames and several areas there would be little left of it.
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
"""Width by height: what cameras and screens have, upright and lying."""


class Bucket(NamedTuple):
    """A size of examples."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Buckets:
    """The sizes that a model is trained on.

    Attributes:
        sizes: (height, width) in pixels; larger areas are preferred where an example is large enough for them. Areas
            that differ by less than 30 % count as one.
        frames: numbers of frames. Pictures go to 1; videos to the largest number that they have.
        max_upscale: how far an example may be enlarged for its bucket: 1.25 is by a quarter, 1.0 not at all.
        picking: which frames of a video are taken.

    Raises:
        TrainingDataError: there are no sizes or frames, or they are not positive.
    """

    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...] = (1,)
    max_upscale: float = 1.25
    picking: FramePicking = field(default_factory=FramePicking)

    def __post_init__(self) -> None:
        if not self.sizes or any(len(size) != 2 or min(size) < 1 for size in self.sizes):
            raise TrainingDataError(f"sizes={self.sizes!r}; they are pairs (height, width) in pixels, one at least.")
        if not self.frames or min(self.frames) < 1:
            raise TrainingDataError(f"frames={self.frames!r}; they are numbers of frames, one at least.")
        if not self.max_upscale > 0:
            raise TrainingDataError(f"max_upscale={self.max_upscale!r}; it is a factor above 0, 1.0 for no enlarging.")

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
        """Buckets of these areas and aspects.

        Args:
            area: pixels of a frame, or several such numbers. What comes out has about as many.
            multiple: what height and width are multiples of: the VAE's factor times the model's patch.
            aspects: width by height.
            frames: numbers of frames.
            frame_rule: (step, offset): frames are a multiple of step, plus offset; (4, 1) is 4n + 1.
            max_upscale: how far an example may be enlarged.
            picking: which frames of a video are taken.

        Raises:
            TrainingDataError: frames that break the rule, with those near them that do not; or senseless numbers.
        """
        areas = (area,) if isinstance(area, int) else tuple(area)
        if multiple < 1 or not areas or min(areas) < multiple**2:
            raise TrainingDataError(
                f"area={area!r}, multiple={multiple}: an area is that of {multiple}x{multiple} pixels at least."
            )
        if not aspects or min(aspects) <= 0:
            raise TrainingDataError(f"aspects={tuple(aspects)!r}; they are widths by heights above 0, one at least.")
        for number in frames:
            check_frames(number, frame_rule)
        sizes = dict.fromkeys(_size(each, aspect, multiple) for each in areas for aspect in aspects)
        return Buckets(tuple(sizes), tuple(frames), max_upscale, picking or FramePicking())

    def bucket(self, example: Example) -> Bucket:
        """Where `example` belongs: the largest area for which it need not be enlarged too far; there, the aspect that
        is nearest; and the most frames that it has.

        Raises:
            TrainingDataError: it is too small or too short for all, or a video where there are only pictures or the
                other way round.
        """
        frames = self._frames(example)
        by_area = sorted(self.sizes, key=lambda size: (-size[0] * size[1], size))
        needed = math.inf
        while by_area:
            # Rounding to a multiple makes areas that are meant to be one differ; by a sixth for small ones.
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
            f"{example.width}x{example.height} pixels would have to be enlarged {needed:.2f} times, and max_upscale is "
            f"{self.max_upscale:g}"
        )

    def numbers(self, example: Example, bucket: Bucket) -> list[int]:
        """The numbers of the frames of `example` that it has in `bucket`."""
        if example.kind == "image":
            return [0]
        return self.picking.numbers(example.frames, example.fps, bucket.frames, example.times)

    def _frames(self, example: Example) -> int:
        have = ", ".join(map(str, sorted(self.frames)))
        if example.kind == "image":
            if 1 not in self.frames:
                raise TrainingDataError(
                    f"a picture, and buckets are of {have} frames. Add 1 to `frames` to train on both, or leave it out"
                )
            return 1
        moving = [number for number in self.frames if number > 1]
        if not moving:
            raise TrainingDataError(
                "a video, and buckets are of single frames. Leave it out, or save one of its frames as a picture; a "
                "model of videos also takes larger `frames`"
            )
        usable = self.picking.usable(example.frames, example.fps, example.times)
        fitting = [number for number in moving if number <= usable]
        if not fitting:
            at = f" at {self.picking.fps:g} per second" if self.picking.fps else ""
            raise TrainingDataError(f"it gives {usable} frames{at}, and buckets are of {have} frames")
        return max(fitting)


def check_frames(frames: int, frame_rule: tuple[int, int]) -> None:
    """Raises a `TrainingDataError` where `frames` is not a multiple of the rule's step plus its offset."""
    step, offset = frame_rule
    if step < 1:
        raise TrainingDataError(f"frame_rule={frame_rule!r}; it is (step, offset) with a step of 1 at least.")
    if frames >= 1 and (frames - offset) % step == 0:
        return
    below = (frames - offset) // step * step + offset
    near = " or ".join(str(number) for number in (below, below + step) if number >= 1)
    raise TrainingDataError(f"frames={frames}; the model takes {step}n + {offset} of them: {near}.")


def cover_scale(height: int, width: int, to_height: int, to_width: int) -> float:
    """By how much something of `height` x `width` is enlarged where it is to cover another size."""
    return max(to_height / height, to_width / width)


def _size(area: int, aspect: float, multiple: int) -> tuple[int, int]:
    """Of the sizes of such multiples around the exact one, that whose aspect and area are nearest."""
    if aspect < 1:  # upright sizes are those that lie, turned
        width, height = _size(area, 1 / aspect, multiple)
        return height, width
    exact = (math.sqrt(area / aspect), math.sqrt(area * aspect))
    heights, widths = (
        {max(multiple, side // multiple * multiple), math.ceil(side / multiple) * multiple} for side in map(int, exact)
    )

    def distance(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        # A wrong aspect cuts off a part of every example; a wrong area costs nothing but time.
        wrong_aspect, wrong_area = math.log(size[1] / size[0] / aspect), math.log(size[0] * size[1] / area)
        return 2 * abs(wrong_aspect) + abs(wrong_area), size

    return min(((height, width) for height in heights for width in widths), key=distance)
