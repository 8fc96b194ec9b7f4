"""Several sets of training data in one run, each with settings of its own."""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TrainingError
from .bounds import COUNT, Bounds
from .setting import check_value, did_you_mean, file_value, metadata_of, setting


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder or a Hugging Face dataset with its settings. In a run file it is an entry of `datasets`."""

    path: str = setting("", "Folder of images or videos with captions, or a Hugging Face dataset")
    repeats: int = setting(1, "Number of times each example is used per epoch, times --repeats", bounds=COUNT)
    caption_prefix: str = setting("", "Text before every caption, such as a trigger word and a comma")
    resolution: list[int] | None = setting(
        None, "Resolution of this data (default: that of the run)", bounds=Bounds(1, 2**14)
    )
    num_frames: list[int] | None = setting(
        None, "Numbers of frames of this data (default: that of the run)", bounds=COUNT
    )


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
        if not values.get("path"):
            raise TrainingError(f"{where}: `path` is missing. {metadata_of(fields['path']).help}.")
        found.append(DataSet(**values))
    return found
