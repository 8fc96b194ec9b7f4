"""Sources of an encoded image or video: a file, or a row of a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class Source(Protocol):
    """An encoded image or video."""

    def open(self) -> BinaryIO:
        """Opens the bytes as a seekable file, which the caller closes."""
        ...

    def stamp(self) -> str:
        """A text that changes whenever the content changes, found without reading the content."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file."""

    path: Path

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def stamp(self) -> str:
        # Programs can set the modification time, but not the change time (ctime).
        status = self.path.stat()
        return f"{self.path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


@dataclass(frozen=True)
class RowSource:
    """A row of a `datasets.Dataset` in the format "arrow". Its `column` has undecoded media: bytes or a file's path."""

    dataset: Any = field(repr=False)
    index: int
    column: str

    def open(self) -> BinaryIO:
        cell = self._cell().as_py()
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise FileNotFoundError(f"column {self.column!r} is empty")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).open("rb")

    def stamp(self) -> str:
        # A dataset's fingerprint covers its rows and transforms, but not the files that rows name.
        cell = self._cell()
        named = FileSource(Path(cell["path"].as_py())).stamp() if not cell["bytes"].is_valid else ""
        return f"{self.dataset._fingerprint}:{self.index}:{self.column}:{named}"

    def _cell(self) -> Any:
        # An Arrow value, since a Python value would copy the bytes.
        return self.dataset[self.index : self.index + 1].column(self.column)[0]


def content_digest(source: Source) -> str:
    """The SHA-256 of a source's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with source.open() as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
