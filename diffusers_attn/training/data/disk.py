"""What goes wrong between memory and disk: a disk that is full, a file that came back other than it was written."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ...atomic_files import write_atomically

_BLOCK = 1 << 20


class WritingError(OSError):
    """Something could not be written. The message says what, where, how large it is and how much room there is."""


@contextlib.contextmanager
def writing(what: str, path: Path, size: int | None = None, left: str = "") -> Iterator[None]:
    """Whatever writing raises within becomes a `WritingError`.

    safetensors and torch.save report a full disk in errors and words of their own.

    Args:
        what: for the message: "the checkpoint of step 5".
        path: where it is written to.
        size: bytes that it needs, where that is known.
        left: what the user still has, as a sentence.
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
            reason = "no space is left"  # what torch.save says of it is about its own code
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
    """Whether an error that is no OSError is about writing: of safetensors or of torch.save."""
    text = str(error)
    return "os error" in text or "PytorchStreamWriter" in text or "unexpected pos" in text


def free_space(path: Path) -> int | None:
    """Bytes that are free where `path` is or would be; None where that cannot be found out."""
    for each in (path, *path.parents):
        if each.exists():
            with contextlib.suppress(OSError):
                return shutil.disk_usage(each).free
            return None
    return None


def human_size(size: float) -> str:
    """Of bytes: "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def checksum(blocks: Iterable[bytes | memoryview]) -> str:
    """The CRC-32 of all blocks, eight hexadecimal digits. It finds damage, and is not meant against forgery."""
    total = 0
    for block in blocks:
        total = zlib.crc32(block, total)
    return f"{total:08x}"


def file_checksum(path: Path) -> str:
    """The checksum of a file's content."""

    def blocks() -> Iterator[bytes]:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block

    return checksum(blocks())
