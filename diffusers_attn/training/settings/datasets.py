"""Several sets of training data in one run, each with settings of its own."""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TrainingError
from .bounds import COUNT, POSITIVE, Bounds
from .choices import CLIPS, MASKS
from .setting import check_value, did_you_mean, file_value, metadata_of, setting


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
        TrainingError: an entry is not a table, has an unknown name or no path, or a value is not accepted.
    """
    fields = {field.name: field for field in dataclasses.fields(DataSet)}
    hints = typing.get_type_hints(DataSet)
    found = []
    if not isinstance(entries, (list, tuple)):
        raise TrainingError("datasets: a list is accepted, with `path` and other settings in each entry.")
    for number, entry in enumerate(entries, 1):
        where = f"datasets, entry {number}"
        if not isinstance(entry, Mapping):
            raise TrainingError(f"{where}: names with values are accepted, such as `path: photos/`.")
        values = {}
        for name, value in entry.items():
            if name not in fields:
                raise TrainingError(
                    f"{where}: {name!r} is not one of {', '.join(fields)}.{did_you_mean(str(name), list(fields))}"
                )
            try:
                values[name] = file_value(name, value, hints[name])
                check_value(name, values[name], hints[name], metadata_of(fields[name]))
            except TrainingError as error:
                raise TrainingError(f"{where}: {error}") from error
        if values.get("regularisation") and values.get("trigger_word"):
            raise TrainingError(
                f"{where}: `trigger_word` with `regularisation`, which has none. Leave one of them out."
            )
        if not values.get("path"):
            raise TrainingError(f"{where}: `path` is missing. {metadata_of(fields['path']).help}.")
        found.append(DataSet(**values))
    return found
