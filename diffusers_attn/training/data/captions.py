"""Which caption belongs to which file of a folder: from `metadata.jsonl` or `metadata.csv`, or from a `.txt` beside
the file. Each file must get exactly one, and each caption must go to a file; all else is a problem with a name."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .errors import Problem

CAPTION_COLUMNS = ("caption", "text", "prompt")
FILE_COLUMN = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv")


def captions_of_folder(root: Path, caption_column: str | None = None) -> tuple[dict[str, str], list[Problem]]:
    """The captions of pictures and videos in `root` and the folders in it, by their path within `root`.

    Files and folders whose names begin with a dot are not looked at. A metadata file is about its own folder and what
    is in it.

    Args:
        root: the folder.
        caption_column: the column of captions in metadata; None is the one of `CAPTION_COLUMNS` that is there.

    Returns:
        Captions by path, and what is wrong.
    """
    files = sorted(
        path for path in root.rglob("*") if path.is_file() and not any(part[0] == "." for part in _parts(path, root))
    )
    media = {_name(path, root): path for path in files if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES}
    problems: list[Problem] = []
    told: dict[str, list[tuple[str, str]]] = defaultdict(list)
    """for each file, where a caption for it is and what it says"""
    blamed: set[str] = set()
    """files with a problem that says why they have no caption"""
    for path in files:
        if path.name in METADATA:
            _from_metadata(path, root, caption_column, media, told, blamed, problems)
    _from_text_files(files, root, media, told, blamed, problems)

    captions = {}
    for name in media:
        places = told.get(name, [])
        if len(places) == 1:
            captions[name] = places[0][1]
        elif places:
            problems.append(Problem(name, f"captioned {len(places)} times: {', '.join(place for place, _ in places)}"))
        elif name not in blamed:
            problems.append(Problem(name, "no caption: it is in no metadata file and has no .txt beside it"))
    return captions, problems


def _from_metadata(
    path: Path,
    root: Path,
    caption_column: str | None,
    media: dict[str, Path],
    told: dict[str, list[tuple[str, str]]],
    blamed: set[str],
    problems: list[Problem],
) -> None:
    metadata = _name(path, root)
    for line, row in _rows(path):
        place = f"{metadata} line {line}"
        if isinstance(row, str):
            problems.append(Problem(place, row))
            continue
        given = row.get(FILE_COLUMN)
        if not isinstance(given, str) or not given.strip():
            problems.append(Problem(place, f"no {FILE_COLUMN!r}; it has {', '.join(map(str, row)) or 'nothing'}"))
            continue
        file = path.parent / given.strip()
        if not file.is_file():
            problems.append(Problem(place, f"there is no file {given}"))
            continue
        name = _name(file, root)
        if name not in media:
            problems.append(Problem(place, f"{given} is outside of the folder, or neither picture nor video"))
            continue
        columns = [each for each in ((caption_column,) if caption_column else CAPTION_COLUMNS) if row.get(each)]
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
        text = _name(path, root)
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


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The lines with their numbers, counted from 1; for one that cannot be read, what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, f"not UTF-8: {error}"
        return
    if path.suffix == ".csv":
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
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, value if isinstance(value, dict) else f"not a JSON object but {type(value).__name__}"


def _parts(path: Path, root: Path) -> tuple[str, ...]:
    return path.relative_to(root).parts


def _name(path: Path, root: Path) -> str:
    """The path within `root`, with slashes; names with `..` in them are made plain, and may then lie outside."""
    return Path(os.path.relpath(path, root)).as_posix()
