"""Hugging Face datasets: loading them, and finding their columns of media, captions, masks and conditions.

A dataset is Parquet or Arrow files, shards of WebDataset (.tar), what `Dataset.save_to_disk` wrote, or a name on the
Hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import decode
from .captions import CAPTION_COLUMNS
from .conditions import Given, columns_named
from .errors import TrainingDataError
from .source import RowSource
from .walk import files_of

_TABLES = {".parquet", ".arrow", ".tar"}
_MASK = "mask"


class Columns(NamedTuple):
    """The columns of a dataset that training reads."""

    media: str
    caption: str
    """Name of the column, or of its field, with the captions."""
    captions: list[Any]
    """The value of each row's caption."""
    names: list[str]
    """Name of each row, for messages."""
    mask: str | None
    conditions: dict[str, list[str]]
    """The columns of conditions by their kind."""
    kinds: dict[str, Literal["image", "video"]]
    """What the columns of media, masks and conditions have."""
    rows: Any
    """The dataset in the format "arrow", with these columns undecoded."""

    @property
    def kind(self) -> Literal["image", "video"]:
        """What the column of media has."""
        return self.kinds[self.media]

    def has(self, column: str | None, index: int) -> bool:
        """Whether a row has something in a column. False without a column."""
        return column is not None and self.rows[index : index + 1].column(column)[0].is_valid

    def conditions_of(self, index: int) -> dict[str, tuple[Given, ...]]:
        """The conditions of a row by their kind."""
        return {
            name: tuple(
                Given(RowSource(self.rows, index, each), self.kinds[each]) for each in columns if self.has(each, index)
            )
            for name, columns in self.conditions.items()
        }


def columns_of(
    dataset: Any, name: str, caption_column: str | None, masks: bool, conditions: Sequence[str] = ()
) -> Columns:
    """The columns of a `datasets.Dataset`.

    Args:
        dataset: the dataset.
        name: its name, for messages.
        caption_column: column with the captions, or a field of one, such as "json.caption". None: the only one of the
            usual names: `caption`, `text`, `prompt`, WebDataset's `txt`, and those of fields of its `json`.
        masks: whether a column `mask` (of WebDataset: `mask.png`) has masks of the loss.
        conditions: kinds of conditions; see `conditions.columns_named`.

    Raises:
        TrainingDataError: there is not exactly one column of media or of captions.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TrainingDataError(
            f"{name} is a {type(dataset).__name__}; accepted is a datasets.Dataset, one split and not streamed."
        )
    undecoded: dict[str, Any] = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, (datasets.Image, datasets.Video)):
            undecoded[column] = type(feature)(decode=False)
    mask = next((each for each in undecoded if masks and each.partition(".")[0] == _MASK), None)
    of_conditions = {each: columns_named(each, undecoded) for each in conditions}
    taken = {mask, *itertools.chain.from_iterable(of_conditions.values())}
    media = [each for each in undecoded if each not in taken]
    if len(media) != 1:
        raise TrainingDataError(
            f"{name} must have one column of images or videos, but has {len(media)} ({', '.join(media) or 'none'}). "
            f"Its columns are {', '.join(dataset.column_names)}. Change them with `Dataset.remove_columns` or "
            "`Dataset.cast_column`, save the result with `save_to_disk`, and give that folder. (loss_mask='files' "
            "reads masks from a column `mask`; models that take reference images or a control read these from columns "
            "`references` and `control`.)"
        )
    wanted = [*media, *filter(None, taken)]
    rows = dataset.select_columns(wanted)
    for column in wanted:
        rows = rows.cast_column(column, undecoded[column])
    keys = dataset["__key__"] if "__key__" in dataset.column_names else None
    names = [f"row {i}" if keys is None else f"row {i} ({keys[i]})" for i in range(len(dataset))]
    kinds: dict[str, Literal["image", "video"]] = {
        each: "image" if isinstance(undecoded[each], datasets.Image) else "video" for each in wanted
    }
    caption, captions = _captions(dataset, name, caption_column)
    return Columns(media[0], caption, captions, names, mask, of_conditions, kinds, rows.with_format("arrow"))


def _captions(dataset: Any, name: str, asked: str | None) -> tuple[str, list[Any]]:
    """Name of the column of captions, and its values."""
    fields = {
        f"{column}.{field}" for column, feature in dataset.features.items() if isinstance(feature, dict)
        for field in feature
    }  # fmt: skip
    usual = (*CAPTION_COLUMNS, "txt", *(f"json.{each}" for each in CAPTION_COLUMNS))
    there = [*dataset.column_names, *sorted(fields)]
    found = [column for column in ((asked,) if asked else usual) if column in there]
    if len(found) != 1:
        expected = f"a column {asked!r}" if asked else f"exactly one of the columns {', '.join(usual)}"
        raise TrainingDataError(
            f"{name} has the columns {', '.join(there)}; {expected} is expected for captions. Name the column with "
            "caption_column=..."
        )
    if found[0] in dataset.column_names:
        return found[0], list(dataset[found[0]])
    column, _, field = found[0].partition(".")
    return found[0], [None if row is None else row.get(field) for row in dataset[column]]


def saved_by_datasets(path: Path, excluded: Sequence[str | Path]) -> tuple[bool, bool]:
    """Whether `Dataset.save_to_disk` wrote a folder, and whether it has Parquet, Arrow or .tar files but no media."""
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    suffixes = {file.suffix.lower() for file in files_of(path, map(Path, excluded))[0]}
    media = suffixes & (decode.IMAGE_SUFFIXES | decode.VIDEO_SUFFIXES)
    return saved, not media and bool(suffixes & _TABLES)


def load_rows(name: str, split: str, *, saved: bool) -> Any:
    """Loads a `datasets.Dataset`.

    Args:
        name: a folder, or a name on the Hub.
        split: the split.
        saved: whether `Dataset.save_to_disk` wrote the folder.

    Raises:
        TrainingDataError: it cannot be loaded, or has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise TrainingDataError(
            f"{name} is not a folder of images or videos; reading it as a Hugging Face dataset needs `pip install "
            "datasets`."
        ) from error
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:
        raise TrainingDataError(
            f"{name} is not a folder, and cannot be loaded as a Hugging Face dataset (split {split!r}): {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TrainingDataError(
                f"{name} has no split {split!r}; it has {', '.join(map(repr, loaded))}. Save one of them with "
                "`save_to_disk`, and give that folder."
            )
        loaded = loaded[split]
    return loaded
