"""Several sets of training data in one run, each with settings of its own."""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TrainingError
from .bounds import COUNT, POSITIVE, Bounds
from .choices import CLIPS, MASKS
from .entries import entries_of
from .setting import setting


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder or a Hugging Face dataset with its settings. In a run file it is an entry of `datasets`."""

    path: str = setting("", "Folder of images or videos with captions, or a Hugging Face dataset")
    repeats: int = setting(1, "Number of times each example is used per epoch, times --repeats", bounds=COUNT)
    weight: float = setting(1.0, "Factor of the loss of each example", bounds=POSITIVE)
    regularisation: bool = setting(
        False,
        "Whether these examples show what should not change: they get no --trigger_word, and an epoch uses as many of "
        "them as of all others, times `repeats`",
    )
    caption_prefix: str = setting("", "Text before every caption")
    trigger_word: str | None = setting(None, "Trigger word of this data (default: that of the run)")
    resolution: list[int] | None = setting(
        None, "Resolution of this data (default: that of the run)", bounds=Bounds(1, 2**14)
    )
    num_frames: list[int] | None = setting(
        None, "Numbers of frames of this data (default: that of the run)", bounds=COUNT
    )
    clips: str | None = setting(None, "Clips of each video of this data (default: those of the run)", forms=CLIPS)
    loss_mask: str | None = setting(None, "Masks of the loss of this data (default: those of the run)", MASKS)


def datasets_of(entries: Sequence[Mapping[str, Any]]) -> list[DataSet]:
    """Reads and checks the entries of `datasets`.

    Args:
        entries: the settings of each by name.

    Raises:
        TrainingError: as `entries_of` does, or settings contradict each other.
    """
    found = entries_of(DataSet, entries, "datasets", required="path")
    for number, each in enumerate(found, 1):
        if each.regularisation and each.trigger_word:
            raise TrainingError(
                f"datasets, entry {number}: `trigger_word` with `regularisation`, which has none. Leave one of them "
                "out."
            )
    return found
