"""Where the bytes of a picture or video are: a file, or a row of a Hugging Face dataset. What is decoded and hashed
need not know which."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class Source(Protocol):
    """A picture or video, encoded."""

    def open(self) -> BinaryIO:
        """Its bytes, as a file that can be sought in. The caller closes it."""
        ...

    def stamp(self) -> str:
        """What changes when its content does, known without reading it."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file."""

    path: Path

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def stamp(self) -> str:
        # The time of change cannot be set by a program, so a file with a copied time of modification is noticed.
        status = self.path.stat()
        return f"{self.path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


@dataclass(frozen=True)
class RowSource:
    """A row of a `datasets.Dataset` in the format "arrow", whose column `column` holds undecoded media: the bytes, or
    the path of a file."""

    dataset: Any = field(repr=False)
    index: int
    column: str

    def open(self) -> BinaryIO:
        cell = self._cell().as_py()
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise FileNotFoundError(f"column {self.column!r} is empty")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).open("rb")

    def stamp(self) -> str:
        # The fingerprint of a dataset is of the rows and of all that was done to them; not of files that they name.
        cell = self._cell()
        named = FileSource(Path(cell["path"].as_py())).stamp() if not cell["bytes"].is_valid else ""
        return f"{self.dataset._fingerprint}:{self.index}:{self.column}:{named}"

    def _cell(self) -> Any:
        # Arrow's own value: Python's would copy the bytes, which not every use needs.
        return self.dataset[self.index : self.index + 1].column(self.column)[0]


def content_digest(source: Source) -> str:
    """The SHA-256 of the bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with source.open() as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
