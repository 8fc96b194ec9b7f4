"""Conditions of examples: pictures and videos that an example is made from, such as the original of an edited picture.

They come from a folder, or from columns of the tables of the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import decode
from .captions import FILE_COLUMN, METADATA, path_named, rows_of_table
from .errors import Problem, TrainingDataError, report_problems
from .source import FileSource, Source
from .walk import files_of

if TYPE_CHECKING:
    from .examples import Example

MOST = 9
"""Largest number of conditions of one kind."""
SHAPE_TOLERANCE = 0.02
"""Largest relative difference between the shape (width / height) of an example and that of a condition that follows it.
Smaller ones come from rounding a size."""


class Kind(NamedTuple):
    """A kind of condition."""

    what: str
    follows: bool
    """Whether it follows its example frame by frame: the condition of a video is a video with the same frames, or one
    picture for all of them. Otherwise it is a picture."""
    of: str | None = None
    """The kind without which it means nothing."""


CONDITIONS = {
    "references": Kind("reference image", follows=False),
    "control": Kind("control picture or video", follows=True),
    "control_mask": Kind("control mask", follows=True, of="control"),
}
"""All kinds, by the names of their settings and columns."""


class Wanted(NamedTuple):
    """What a model does with a kind of condition."""

    most: int = 1
    """Largest number of them for each example."""
    needed: bool = True
    """Whether every example must have one. Otherwise all have some, or none has any."""
    instead: tuple[str, ...] = ()
    """Kinds of which one suffices if it is needed."""


class Given(NamedTuple):
    """A condition of one example."""

    source: Source
    kind: Literal["image", "video"]


def given_file(path: Path) -> Given:
    """A file as a condition."""
    return Given(FileSource(path), "video" if path.suffix.lower() in decode.VIDEO_SUFFIXES else "image")


def probe(given: Given) -> decode.Media:
    """The properties of a condition. Raises as `decode.probe_image` and `decode.probe_video` do."""
    return (decode.probe_video if given.kind == "video" else decode.probe_image)(given.source)


def columns_named(name: str, there: Iterable[str]) -> list[str]:
    """The columns with conditions of one kind: `control`, or `control_1`, `control_2` and so on if there are several.
    Those of WebDataset have a suffix, such as `control.png`."""
    accepted = [name, *(f"{name}_{number}" for number in range(1, MOST + 1))]
    stems = {column.partition(".")[0]: column for column in there}
    return [stems[each] for each in accepted if each in stems]


def conditions_of_folder(
    root: Path, names: Sequence[str], excluded: Iterable[Path] = ()
) -> dict[str, dict[str, tuple[Given, ...]]]:
    """The conditions that the metadata files of a folder name, relative to themselves, in columns of `names`.

    Args:
        root: the folder.
        names: kinds of conditions.
        excluded: folders that are not read.

    Returns:
        The conditions by kind of each image or video, which is named relative to `root`. Rows that cannot be read are
        left out; `captions_of_folder` reports them.
    """
    columns = {name: [name, *(f"{name}_{number}" for number in range(1, MOST + 1))] for name in names}
    found: dict[str, dict[str, tuple[Given, ...]]] = {}
    if not names:
        return found
    for path in files_of(root, excluded)[0]:
        if path.name.lower() not in METADATA:
            continue
        folder = posixpath.dirname(path.relative_to(root).as_posix())
        for _, row in rows_of_table(path, [FILE_COLUMN, *itertools.chain.from_iterable(columns.values())]):
            if isinstance(row, str) or not isinstance(row.get(FILE_COLUMN), str):
                continue
            files = {
                name: [
                    root / path_named(root, folder, file) for each in columns[name] for file in _texts(row.get(each))
                ]
                for name in names
            }
            found[path_named(root, folder, row[FILE_COLUMN])] = {
                name: tuple(map(given_file, each)) for name, each in files.items() if each
            }
    return found


def _texts(value: object) -> list[str]:
    """The files in a column: one, or a list of several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, str) and each.strip()]


def only_conditions(root: Path, conditions: Mapping[str, Mapping[str, Sequence[Given]]]) -> set[str]:
    """The files that are conditions and no examples, since they have no caption: by path relative to `root`."""
    named = {
        each.source.path.resolve()
        for of_example in conditions.values()
        for several in of_example.values()
        for each in several
        if isinstance(each.source, FileSource)
    }
    examples = {(root / name).resolve() for name in conditions}
    within = [each for each in named - examples if each.is_relative_to(root.resolve())]
    return {each.relative_to(root.resolve()).as_posix() for each in within if not each.with_suffix(".txt").is_file()}


def with_conditions(
    examples: Sequence[Example],
    wanted: Mapping[str, Wanted],
    folders: Mapping[str, str | Path],
    *,
    numbers: dict[str, int] | None = None,
    on_bad_data: str = "refuse",
    main_process: bool = True,
) -> list[Example]:
    """Finds the conditions of examples, and checks them.

    In a folder, that of `people/a.png` is `people/a.*`. An example with several has `a_1.*`, `a_2.*` and so on instead.
    Without a folder, those that examples have from columns are used. All examples have equally many.

    Args:
        examples: the examples. With folders, they must be files.
        wanted: the conditions that the model uses, by kind.
        folders: the folder of each kind that has one.
        numbers: number of conditions of each kind, to which those of the first example are added.
        on_bad_data: "refuse" raises an error that names all problems; "skip" leaves these examples out.
        main_process: whether this process logs the warning about examples that are left out.

    Returns:
        The examples with the `conditions` that are wanted.

    Raises:
        TrainingDataError: there is no such folder, the examples are rows of a dataset and there is a folder, there are
            problems and `on_bad_data` is "refuse", or no example is usable.
    """
    numbers = {} if numbers is None else numbers
    files = {name: _files(name, folder) for name, folder in folders.items()}
    for name in folders:
        if not all(isinstance(each.source, FileSource) for each in examples):
            raise TrainingDataError(
                f"--{name} has a folder for the files of a folder, but the data are rows of a dataset. Leave it out, "
                f"and give the dataset a column of images or videos that is named {name}."
            )
    found, problems = [], []
    for example in examples:
        try:
            conditions = {
                name: _in_folder(example, name, files[name]) if name in files else example.conditions.get(name, ())
                for name in wanted
            }
            for name in conditions:
                _check(example, name, wanted[name], conditions, folders.get(name))
            for name, given in conditions.items():
                _check_number(name, len(given), numbers.setdefault(name, len(given)))
        except TrainingDataError as error:
            problems.append(Problem(example.name, str(error)))
            continue
        given_ones = {name: given for name, given in conditions.items() if given}
        found.append(dataclasses.replace(example, conditions=given_ones))
    if wanted:
        where = " and ".join(str(each) for each in folders.values()) or "the columns of the data"
        report_problems(problems, len(found), where, on_bad_data, main_process)
    return found


def _files(name: str, folder: str | Path) -> dict[str, Path]:
    """The pictures and videos in a folder by relative path without suffix."""
    root = Path(folder).expanduser()
    kind = CONDITIONS[name]
    if not root.is_dir():
        raise TrainingDataError(f"--{name}: there is no folder {folder}.")
    suffixes = decode.IMAGE_SUFFIXES | (decode.VIDEO_SUFFIXES if kind.follows else set())
    return {
        _stem(file.relative_to(root).as_posix()): file
        for file in files_of(root)[0]
        if file.suffix.lower() in suffixes
    }  # fmt: skip


def _in_folder(example: Example, name: str, files: Mapping[str, Path]) -> tuple[Given, ...]:
    stem = _stem(example.name)
    if stem in files:
        return (given_file(files[stem]),)
    numbered = (f"{stem}_{number}" for number in itertools.count(1))
    return tuple(given_file(files[each]) for each in itertools.takewhile(files.__contains__, numbered))


def _check(
    example: Example,
    name: str,
    wanted: Wanted,
    conditions: Mapping[str, Sequence[Given]],
    folder: str | Path | None,
) -> None:
    """Raises a TrainingDataError if conditions of one kind are missing, too many, unreadable, or do not follow their
    example."""
    kind, given, stem = CONDITIONS[name], conditions[name], _stem(example.name)
    what = kind.what
    if not given and wanted.needed and not any(conditions.get(each) for each in wanted.instead):
        missing = " and ".join(f"no {CONDITIONS[each].what}" for each in (name, *wanted.instead))
        if folder is None:
            raise TrainingDataError(
                f"{missing}: nothing in a column {name} of its table, and no --{name} with a folder that has {stem}.*"
            )
        raise TrainingDataError(
            f"{missing}: no {stem}.* or {stem}_1.* in {folder} (a column {name} of its table is read without --{name})"
        )
    if given and kind.of is not None and not conditions.get(kind.of):
        raise TrainingDataError(f"a {what} without a {CONDITIONS[kind.of].what}")
    if len(given) > wanted.most:
        raise TrainingDataError(f"its number of {what}s is {len(given)}, but the model accepts {wanted.most}")
    for each in given:
        try:
            media = probe(each)
        except TrainingDataError as error:
            raise TrainingDataError(f"its {what}: {error}") from error
        wider = (media.width / media.height) / (example.width / example.height)
        if kind.follows and abs(wider - 1) > SHAPE_TOLERANCE:
            raise TrainingDataError(
                f"its {what} has {media.width}x{media.height} pixels, but it has {example.width}x{example.height}; "
                "the same shape is needed, in any size, since both are cropped alike"
            )
        if each.kind == "image":
            continue
        if not kind.follows or example.kind == "image":
            raise TrainingDataError(f"its {what} is a video; a picture is needed")
        if media.frames != example.frames:
            raise TrainingDataError(
                f"its {what} has {media.frames} frames, but it has {example.frames}; equal numbers are needed"
            )


def _check_number(name: str, number: int, first: int) -> None:
    if number != first:
        what = CONDITIONS[name].what
        raise TrainingDataError(f"its number of {what}s is {number}, but that of the first example is {first}")


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
