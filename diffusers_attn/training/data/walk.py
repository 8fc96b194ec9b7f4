"""Lists the files of a folder of training data, including linked folders."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from .errors import Problem

RUN_MARK = ".diffusers_attn-run.json"
"""A file in every folder that a run writes to. Such a folder is not read as training data."""


def files_of(root: Path, excluded: Iterable[Path] = ()) -> tuple[list[Path], list[Problem]]:
    """The files in a folder and its subfolders.

    Files and folders whose names begin with a dot, folders that a run wrote to, and `excluded` folders are left out.
    Links to folders are followed. A folder that is reached twice, for example through a link to its parent, is read
    once and reported as a problem.

    Args:
        root: the folder.
        excluded: folders to leave out, within `root` or not.

    Returns:
        The files, sorted, and the problems.
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
            problems.append(Problem(name(folder), f"a link to a folder that was read already: {read[identity] or '.'}"))
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
                links.append(path)  # read last, so that a folder is named by its own path and not by a link
            elif entry.is_file():
                files.append(path)
            elif entry.is_symlink():
                problems.append(Problem(name(path), f"a link to nothing: {os.readlink(path)}"))

    look(root)
    while links:
        look(links.popleft())
    return sorted(files), problems


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder, which do not depend on its path; None if it does not exist."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
