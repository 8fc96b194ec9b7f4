"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from .disk import writing

_UNFINISHED = re.compile(r"\.(?P<host>[^/]+)-(?P<process>\d+)-[0-9a-f]+\.unfinished")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new file beside `path`, which then takes the place of `path` in one step.

    Args:
        path: the file; its folder is made where there is none.
        write: is given the path to write to. What it raises goes on, and leaves `path` as it was.

    Raises:
        WritingError: the disk is full, or will not have it.
    """
    unfinished = path.parent / f".{_host()}-{os.getpid()}-{secrets.token_hex(8)}.unfinished"
    with writing("a file", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            _to_disk(unfinished)
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    with contextlib.suppress(OSError):  # file systems that cannot do this for a folder do not need it
        _to_disk(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed have left in `folder`. What others write meanwhile stays."""
    for path in folder.rglob(".*.unfinished"):
        named = _UNFINISHED.fullmatch(path.name)
        if named and named["host"] == _host() and not _runs(int(named["process"])):
            path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return socket.gethostname().replace("/", "_")


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere, asking in this way would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
