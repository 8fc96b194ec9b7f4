"""A file with the checksums of a checkpoint's files, so that damage is detected before the checkpoint is loaded."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from ...json_files import read_json
from ..data.disk import file_checksum

MANIFEST = "checksums.json"


def write_manifest(folder: Path) -> None:
    """Writes the size and checksum of every file in `folder` and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": file_checksum(path)}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """Describes the first damaged file of a checkpoint; None if all files are intact."""
    manifest = folder / MANIFEST
    try:
        entries = read_json(manifest)
        expected = {str(name): (int(each["bytes"]), str(each["crc32"])) for name, each in entries.items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{manifest} cannot be read ({type(error).__name__}: {error})"
    if "state.json" not in expected:
        return f"{manifest} does not name state.json"
    for name, (size, crc) in expected.items():
        path = folder / name
        within = PurePosixPath(name)  # each of two experts has a folder
        if within.is_absolute() or ".." in within.parts or not path.resolve().is_relative_to(folder.resolve()):
            return f"{manifest} names {name!r}, which is no file of this folder"
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, but {size} were written"
            if file_checksum(path) != crc:
                return f"{path} has another checksum than when it was written"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error})"
    return None
