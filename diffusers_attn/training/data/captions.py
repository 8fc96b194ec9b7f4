"""Which caption belongs to which file of a folder: from `metadata.jsonl`, `.csv` or `.parquet`, or from a `.txt` beside
the file. Each file must get exactly one, and each caption must go to a file; all else is a problem with a name."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .decode import IMAGE_SUFFIXES, UNREAD_SUFFIXES, VIDEO_SUFFIXES
from .errors import Problem
from .walk import files_of

CAPTION_COLUMNS = ("caption", "text", "prompt")
FILE_COLUMN = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PLACES_NAMED = 5


def captions_of_folder(
    root: Path, caption_column: str | None = None, excluded: Iterable[Path] = ()
) -> tuple[dict[str, str], list[Problem]]:
    """The captions of pictures and videos in `root` and the folders in it, by their path within `root`.

    Files and folders whose names begin with a dot are not looked at. A metadata file is about its own folder and what
    is in it.

    Args:
        root: the folder.
        caption_column: the column of captions in metadata; None is the one of `CAPTION_COLUMNS` that is there.
        excluded: folders that are not looked at.

    Returns:
        Captions by path, and what is wrong.
    """
    files, problems = files_of(root, excluded)
    media = {
        path.relative_to(root).as_posix(): path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
    }
    names = {path.relative_to(root).as_posix() for path in files}
    problems += [
        Problem(path.relative_to(root).as_posix(), f"{path.suffix} is not read. Save it as PNG, JPEG or WebP")
        for path in files
        if path.suffix.lower() in UNREAD_SUFFIXES
    ]
    told: dict[str, list[tuple[str, str]]] = defaultdict(list)
    """for each file, where a caption for it is and what it says"""
    blamed: set[str] = set()
    """files with a problem that says why they have no caption"""
    for path in files:
        if path.name.lower() in METADATA:
            _from_metadata(path, root, caption_column, media, names, told, blamed, problems)
    _from_text_files(files, root, media, told, blamed, problems)

    captions = {}
    for name in media:
        places = told.get(name, [])
        if len(places) == 1:
            captions[name] = places[0][1]
        elif places:
            where = ", ".join(place for place, _ in places[:_PLACES_NAMED])
            more = ", ..." if len(places) > _PLACES_NAMED else ""
            problems.append(Problem(name, f"captioned {len(places)} times: {where}{more}"))
        elif name not in blamed:
            problems.append(Problem(name, "no caption: it is in no metadata file and has no .txt beside it"))
    return captions, problems


def _from_metadata(
    path: Path,
    root: Path,
    caption_column: str | None,
    media: dict[str, Path],
    names: set[str],
    told: dict[str, list[tuple[str, str]]],
    blamed: set[str],
    problems: list[Problem],
) -> None:
    metadata = path.relative_to(root).as_posix()
    folder = posixpath.dirname(metadata)
    wanted = (caption_column,) if caption_column else CAPTION_COLUMNS
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    for line, row in _rows(path, [FILE_COLUMN, *wanted]):
        place = f"{metadata} {unit} {line}" if line else metadata
        if isinstance(row, str):
            problems.append(Problem(place, row))
            continue
        given = row.get(FILE_COLUMN)
        if not isinstance(given, str) or not given.strip():
            problems.append(Problem(place, f"no {FILE_COLUMN!r}; it has {', '.join(map(str, row)) or 'nothing'}"))
            continue
        name = posixpath.normpath(posixpath.join(folder, given.strip()))
        if os.path.isabs(name):
            name = Path(os.path.relpath(name, root)).as_posix()
        if name not in media:
            if name.startswith("../"):
                why = f"{given} is outside of the folder"
            else:
                why = f"{given} is neither picture nor video" if name in names else f"there is no file {given}"
            problems.append(Problem(place, why))
            continue
        columns = [each for each in wanted if row.get(each)]
        if len(columns) > 1:
            problems.append(Problem(place, f"{' and '.join(columns)} are there for {given}; say caption_column=..."))
            blamed.add(name)
            continue
        caption = row[columns[0]] if columns else None
        if not isinstance(caption, str) or not caption.strip():
            expected = caption_column or ", ".join(CAPTION_COLUMNS)
            problems.append(Problem(place, f"no caption for {given}: nothing in {expected}"))
            blamed.add(name)
            continue
        told[name].append((place, caption.strip()))


def _from_text_files(
    files: list[Path],
    root: Path,
    media: dict[str, Path],
    told: dict[str, list[tuple[str, str]]],
    blamed: set[str],
    problems: list[Problem],
) -> None:
    beside: dict[Path, list[str]] = defaultdict(list)
    for name, path in media.items():
        beside[path.with_suffix(".txt")].append(name)
    for path in files:
        if path.suffix.lower() != ".txt":
            continue
        text = path.relative_to(root).as_posix()
        names = beside.get(path.with_suffix(".txt"), [])
        if not names:
            problems.append(Problem(text, "a caption for no file: no picture or video has this name"))
            continue
        if len(names) > 1:
            problems.append(Problem(text, f"a caption for several files: {', '.join(names)}"))
            blamed.update(names)
            continue
        try:
            caption = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            problems.append(Problem(text, f"not UTF-8: {error}"))
            blamed.update(names)
            continue
        if caption:
            told[names[0]].append((text, caption))
        else:
            problems.append(Problem(text, f"no caption for {names[0]}: the file is empty"))
            blamed.update(names)


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The lines with their numbers, counted from 1, or 0 for the file itself; for one that cannot be read, what is
    wrong with it. Of a table in Parquet, `columns` are read, and the names of the others where these are missing."""
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
                yield reader.line_num, "more values than columns; a caption with commas needs quotes around it"
            else:
                yield reader.line_num, dict(row)
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        yield 0, f"reading it needs `pip install pyarrow` ({error})"
        return
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            wanted = [each for each in columns if each in there]
            if FILE_COLUMN not in wanted or len(wanted) == 1:
                yield 0, f"it has the columns {', '.join(there)}, and {FILE_COLUMN} and one of {columns[1:]} are needed"
                return
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except Exception as error:  # pyarrow has many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield 0, f"not Parquet that can be read: {reason}"
