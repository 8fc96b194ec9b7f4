"""Writing to disk with clear errors, and checksums that detect damaged files."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ...atomic_files import write_atomically

_BLOCK = 1 << 20


class WritingError(OSError):
    """Data could not be written. The message names the data, the path, the size and the free space."""


@contextlib.contextmanager
def writing(what: str, path: Path, size: int | None = None, left: str = "") -> Iterator[None]:
    """Raises every failure to write within this context as a `WritingError`.

    safetensors and torch.save report a full disk with error types of their own.

    Args:
        what: name of the data for the message, such as "the checkpoint of step 5".
        path: file or folder to write to.
        size: size of the data in bytes, if known.
        left: a sentence for the message about earlier files that remain usable.
    """
    try:
        yield
    except WritingError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or _says_so(error)):
            raise
        needs = "" if size is None else f" It needs {human_size(size)}."
        room = free_space(path)
        free = "" if room is None else f" {human_size(room)} are free there."
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not isinstance(error, OSError) and room is not None and room < (size or 0):
            reason = "no space is left"  # torch.save only reports an internal position
        message = f"{what} could not be written to {path}: {reason}.{needs}{free}"
        raise WritingError(f"{message} {left}".rstrip()) from error


def write_file(path: Path, write: Callable[[Path], object], what: str = "a file") -> None:
    """`write_atomically`, with every failure to write as a `WritingError`.

    Args:
        path, write: as in `write_atomically`.
        what: the content's name for the message, such as "the model card".

    Raises:
        WritingError: the file cannot be written, for example because the disk is full.
    """
    with writing(what, path):
        write_atomically(path, write)


def _says_so(error: Exception) -> bool:
    """Whether an error of safetensors or torch.save that is not an OSError reports a failure to write."""
    text = str(error)
    return "os error" in text or "PytorchStreamWriter" in text or "unexpected pos" in text


def free_space(path: Path) -> int | None:
    """Free bytes on the disk of `path`, which need not exist yet; None if unknown."""
    for each in (path, *path.parents):
        if each.exists():
            with contextlib.suppress(OSError):
                return shutil.disk_usage(each).free
            return None
    return None


def human_size(size: float) -> str:
    """A number of bytes with its unit, such as "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def checksum(blocks: Iterable[bytes | memoryview]) -> str:
    """The CRC-32 of all blocks, eight hexadecimal digits. It detects damage, not tampering."""
    total = 0
    for block in blocks:
        total = zlib.crc32(block, total)
    return f"{total:08x}"


def file_checksum(path: Path) -> str:
    """`checksum` of a file's content."""

    def blocks() -> Iterator[bytes]:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block

    return checksum(blocks())
