"""Lists of tables in files, such as several sets of data: each entry has settings of its own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import TrainingError
from .setting import check_value, did_you_mean, file_value, metadata_of

T = TypeVar("T")


def entries_of(kind: type[T], entries: Any, what: str, required: str) -> list[T]:
    """Reads and checks a list of tables.

    Args:
        kind: dataclass of the settings of an entry.
        entries: the list, of settings by name.
        what: name of the list, for messages.
        required: name of the setting that every entry must have.

    Raises:
        TrainingError: an entry is not a table, has an unknown name or lacks the required one, or a value is not
            accepted.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    found = []
    if not isinstance(entries, (list, tuple)):
        raise TrainingError(f"{what}: a list is accepted, with `{required}` and other settings in each entry.")
    for number, entry in enumerate(entries, 1):
        where = f"{what}, entry {number}"
        if not isinstance(entry, Mapping):
            raise TrainingError(f"{where}: names with values are accepted, such as `{required}: ...`.")
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
        if not values.get(required):
            raise TrainingError(f"{where}: `{required}` is missing. {metadata_of(fields[required]).help}.")
        found.append(kind(**values))
    return found
