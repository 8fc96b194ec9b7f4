"""The buckets of a run and the frame rate of its videos, from its settings and the sizes that its model accepts."""

from __future__ import annotations

from ..data.buckets import ASPECTS, Buckets
from ..data.frames import FramePicking
from ..families import Family
from ..settings.config import TrainConfig
from ..settings.datasets import DataSet

VIDEO_FRAMES = 49
"""Default number of frames of a video bucket."""


def buckets_of(config: TrainConfig, family: Family, source: DataSet | None = None) -> Buckets:
    """The buckets that the settings give, with sizes and numbers of frames that the family accepts.

    Args:
        config: the settings of the run.
        family: the family with its pipeline.
        source: a set of data, whose own settings have precedence. None: those of the run alone.
    """
    step, offset = family.frame_rule
    default = [1] if family.kind == "image" else [(VIDEO_FRAMES - offset) // step * step + offset]
    return Buckets.of(
        [side * side for side in (source and source.resolution) or config.resolution],
        multiple=family.size_multiple,
        aspects=config.aspects or ASPECTS,
        frames=(source and source.num_frames) or config.num_frames or default,
        frame_rule=family.frame_rule,
        max_upscale=config.max_upscale,
        picking=FramePicking(rate_of(config, family), config.frame_pick),
    )


def rate_of(config: TrainConfig, family: Family) -> float | None:
    """Frames per second to which videos are resampled; None for each video's own rate."""
    if config.fps is not None:
        return config.fps or None
    return None if family.kind == "image" or config.frame_pick == "spread" else family.fps
