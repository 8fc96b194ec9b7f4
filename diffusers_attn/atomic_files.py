"""Atomic file writes: whenever the process or the machine stops, a file is either complete or not there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = re.compile(r"\.(?P<host>[^/]+)-(?P<process>\d+)-[0-9a-f]+\.unfinished(\.\w+)?")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a new file beside `path`, flushes it to disk and renames it to `path`.

    Args:
        path: the file to create or replace. Missing parent folders are created.
        write: fills a file at the given path, which has the suffix of `path`. An exception that it raises propagates
            and leaves `path` unchanged.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{_host()}-{os.getpid()}-{secrets.token_hex(8)}.unfinished{path.suffix}"
    try:
        write(unfinished)
        flush_to_disk(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    with contextlib.suppress(OSError):  # file systems that do not support this for folders do not need it
        flush_to_disk(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed processes of this host left in `folder`. Files of running processes stay."""
    for path in folder.rglob(".*.unfinished*"):
        named = _UNFINISHED.fullmatch(path.name)
        if named and named["host"] == _host() and not _runs(int(named["process"])):
            path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Calls fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return socket.gethostname().replace("/", "_")


def _runs(process: int) -> bool:
    if os.name != "posix":  # on other systems, os.kill(process, 0) would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
