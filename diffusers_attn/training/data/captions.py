"""Captions of a folder's files, from `metadata.jsonl`, `.csv` or `.parquet`, or from a `.txt` file with the same name.

Each file needs exactly one caption, or one list of captions, and each caption exactly one file; everything else is
reported as a problem.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from ...json_files import parse_json
from .decode import IMAGE_SUFFIXES, UNREAD_SUFFIXES, VIDEO_SUFFIXES
from .errors import Problem
from .walk import files_of

CAPTION_COLUMNS = ("caption", "text", "prompt")
FILE_COLUMN = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PLACES_NAMED = 5
_MOST_BYTES = 2**20


def captions_of_folder(
    root: Path,
    caption_column: str | None = None,
    excluded: Iterable[Path] = (),
    caption_lines: bool = False,
    left_out: Callable[[str], bool] | None = None,
) -> tuple[dict[str, list[str]], list[Problem]]:
    """The captions of the images and videos in a folder and its subfolders.

    Files and folders whose names begin with a dot are ignored. A metadata file applies to its folder and subfolders.

    Args:
        root: the folder.
        caption_column: column of the captions in metadata. None: the one of `CAPTION_COLUMNS` that exists.
        excluded: folders that are ignored.
        caption_lines: whether each line of a `.txt` file is a caption of its own.
        left_out: whether a file that needs no caption is neither image nor video, by its path relative to `root`.

    Returns:
        The captions of each file by path relative to `root`, and the problems.
    """
    files, problems = files_of(root, excluded)
    media = {
        path.relative_to(root).as_posix(): path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
        and not (left_out and left_out(path.relative_to(root).as_posix()))
    }
    names = {path.relative_to(root).as_posix() for path in files}
    problems += [
        Problem(path.relative_to(root).as_posix(), f"{path.suffix} files cannot be read. Save it as PNG, JPEG or WebP")
        for path in files
        if path.suffix.lower() in UNREAD_SUFFIXES
    ]
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    """For each file, the places with captions, and the texts of each."""
    explained: set[str] = set()
    """Files without a caption for a reason that is among the problems already."""
    for path in files:
        if path.name.lower() in METADATA:
            _from_metadata(path, root, caption_column, media, names, found, explained, problems)
    _from_text_files(files, root, media, caption_lines, found, explained, problems)

    captions = {}
    for name in media:
        places = found.get(name, [])
        if len(places) == 1:
            captions[name] = places[0][1]
        elif places:
            where = ", ".join(place for place, _ in places[:_PLACES_NAMED])
            more = ", ..." if len(places) > _PLACES_NAMED else ""
            problems.append(Problem(name, f"captioned {len(places)} times: {where}{more}"))
        elif name not in explained:
            mask = "; loss_mask='files' uses it as a mask" if PurePath(name).stem.endswith("_mask") else ""
            problems.append(Problem(name, f"no caption: no metadata file names it, and it has no .txt file{mask}"))
    return captions, problems


def _from_metadata(
    path: Path,
    root: Path,
    caption_column: str | None,
    media: dict[str, Path],
    names: set[str],
    found: dict[str, list[tuple[str, list[str]]]],
    explained: set[str],
    problems: list[Problem],
) -> None:
    metadata = path.relative_to(root).as_posix()
    folder = posixpath.dirname(metadata)
    wanted = (caption_column,) if caption_column else CAPTION_COLUMNS
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    for line, row in rows_of_table(path, [FILE_COLUMN, *wanted]):
        place = f"{metadata} {unit} {line}" if line else metadata
        if isinstance(row, str):
            problems.append(Problem(place, row))
            continue
        given = row.get(FILE_COLUMN)
        if not isinstance(given, str) or not given.strip():
            columns = ", ".join(map(str, row)) or "none"
            problems.append(Problem(place, f"no value for {FILE_COLUMN!r}; its columns: {columns}"))
            continue
        name = path_named(root, folder, given)
        if name not in media:
            if name.startswith("../"):
                why = f"{given} is outside of the folder"
            else:
                why = f"{given} is neither image nor video" if name in names else f"there is no file {given}"
            problems.append(Problem(place, why))
            continue
        filled = [each for each in wanted if row.get(each)]
        if len(filled) > 1:
            problems.append(Problem(place, f"{given} has {' and '.join(filled)}; choose one with caption_column=..."))
            explained.add(name)
            continue
        texts = texts_of(row[filled[0]]) if filled else []
        if not texts:
            expected = caption_column or ", ".join(CAPTION_COLUMNS)
            problems.append(Problem(place, f"no caption for {given}: nothing in {expected}"))
            explained.add(name)
            continue
        found[name].append((place, texts))


def path_named(root: Path, folder: str, given: str) -> str:
    """The path relative to `root` of a file that a table in `folder`, relative to `root`, calls `given`."""
    name = posixpath.normpath(posixpath.join(folder, given.strip()))
    return Path(os.path.relpath(name, root)).as_posix() if os.path.isabs(name) else name


def texts_of(value: Any) -> list[str]:
    """The captions in a column: a text, or a list of texts, of which one is drawn at each use; [] for anything else."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(each, str) and each.strip() for each in texts):
        return []
    return [each.strip() for each in texts]


def _from_text_files(
    files: list[Path],
    root: Path,
    media: dict[str, Path],
    caption_lines: bool,
    found: dict[str, list[tuple[str, list[str]]]],
    explained: set[str],
    problems: list[Problem],
) -> None:
    media_of: dict[Path, list[str]] = defaultdict(list)
    for name, path in media.items():
        media_of[path.with_suffix(".txt")].append(name)
    for path in files:
        if path.suffix.lower() != ".txt":
            continue
        text = path.relative_to(root).as_posix()
        names = media_of.get(path.with_suffix(".txt"), [])
        if not names:
            problems.append(Problem(text, "a caption for no file: no image or video has this name"))
            continue
        if len(names) > 1:
            problems.append(Problem(text, f"a caption for several files: {', '.join(names)}"))
            explained.update(names)
            continue
        if path.stat().st_size > _MOST_BYTES:
            problems.append(Problem(text, f"{path.stat().st_size} bytes; a caption has at most {_MOST_BYTES}"))
            explained.update(names)
            continue
        try:
            caption = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            problems.append(Problem(text, f"not UTF-8: {error}"))
            explained.update(names)
            continue
        if caption:
            lines = [line.strip() for line in caption.splitlines() if line.strip()]
            found[names[0]].append((text, lines if caption_lines else [caption]))
        else:
            problems.append(Problem(text, f"no caption for {names[0]}: the file is empty"))
            explained.update(names)


def rows_of_table(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the rows of a metadata file, or a reason why a row cannot be read, each with the number of its line.

    Lines are counted from 1; 0 is the file itself. Only `columns` of a Parquet file are read.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, f"not UTF-8: {error}"
        return
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, f"not CSV: {error}"
                return
            if "" in row:
                yield reader.line_num, "more values than columns; put captions with commas in quotes"
            else:
                yield reader.line_num, dict(row)
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, value if isinstance(value, dict) else f"a JSON object is expected, got {type(value).__name__}"


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        yield 0, f"reading it needs `pip install pyarrow` ({error})"
        return
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [each for each in columns if each in names]
            if FILE_COLUMN not in wanted or len(wanted) == 1:
                needed = f"{FILE_COLUMN} and one of {', '.join(columns[1:])}"
                yield 0, f"it has the columns {', '.join(names)}, but needs {needed}"
                return
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except Exception as error:  # pyarrow has many error types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield 0, f"it cannot be read as Parquet: {reason}"
