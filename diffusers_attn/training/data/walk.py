"""The files of a folder of training data, those of linked folders included."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from .errors import Problem

RUN_MARK = ".diffusers_attn-run.json"
"""a file in every folder that a run writes to; what is in such a folder is no training data."""


def files_of(root: Path, excluded: Iterable[Path] = ()) -> tuple[list[Path], list[Problem]]:
    """The files in `root` and the folders in it, sorted, and what could not be looked at.

    Left out are files and folders whose names begin with a dot, folders that a run wrote to, and `excluded` ones.
    Links to folders are followed. A folder that is reached twice, as by a link to a folder that it is in, is read once
    and named.

    Args:
        root: the folder.
        excluded: folders, which may be anywhere.
    """
    unwanted = {each for each in map(_identity, excluded) if each is not None}
    files: list[Path] = []
    problems: list[Problem] = []
    read: dict[tuple[int, int], str] = {}
    links: deque[Path] = deque()

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix()

    def look(folder: Path) -> None:
        identity = _identity(folder)
        if folder != root and (identity in unwanted or (folder / RUN_MARK).is_file()):
            return
        if identity in read:
            problems.append(Problem(name(folder), f"a link to a folder that is read already: {read[identity] or '.'}"))
            return
        if identity is not None:
            read[identity] = name(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(Problem(name(folder), f"a folder that cannot be read: {error.strerror}"))
            return
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                look(path)
            elif entry.is_dir():
                links.append(path)  # behind all others, so that folders have their own names
            elif entry.is_file():
                files.append(path)
            elif entry.is_symlink():
                problems.append(Problem(name(path), f"a link to nothing: {os.readlink(path)}"))

    look(root)
    while links:
        look(links.popleft())
    return sorted(files), problems


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of a folder, whatever it is called; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
