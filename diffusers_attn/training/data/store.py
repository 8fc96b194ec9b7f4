"""Tensors in safetensors files, each named by a hash of everything that decided what is in it.

So a file that is there never needs to be compared with anything: other settings or other data have other names. A
checksum goes with each, and is compared whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...atomic_files import remove_unfinished
from .disk import checksum, write_file
from .errors import TrainingDataError

_ABOUT = "diffusers_attn"
"""The entry in a file's metadata: a JSON object with `key`, `made_from` and `crc32` of the tensors."""


def hash_of(made_from: Mapping[str, Any]) -> str:
    """A name for what is made from this.

    Args:
        made_from: what JSON can say; the order of keys does not matter.

    Returns:
        64 hexadecimal digits.

    Raises:
        TrainingDataError: JSON cannot say it.
    """
    return hashlib.sha256(_json(made_from).encode()).hexdigest()


class TensorStore:
    """A folder with such files. Any number of processes may write to it.

    Args:
        folder: the folder; made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the file of this key is, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the file is there, is as long as its header says, and was written under this key, with a checksum.
        The tensors themselves are not read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                return about["key"] == key and "crc32" in about
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return False

    def write(self, key: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
        """Writes the file, whole or not at all. `made_from` goes with it, for people who wonder what it is."""
        from safetensors.torch import save_file

        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # One entry: of several, the order in the file would vary.
        metadata = {_ABOUT: _json({"key": key, "made_from": made_from, "crc32": _checksum(own)})}
        write_file(self.path(key), lambda path: save_file(own, path, metadata))

    def remove_unfinished(self) -> None:
        """Removes what processes that were killed have left."""
        remove_unfinished(self.folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        TrainingDataError: it is missing or damaged; names it, and says what to do.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if about.get("crc32") != _checksum(tensors):
        not_finite = [name for name, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]
        raise _damaged(
            path,
            f"there is NaN or infinity in {', '.join(not_finite)}"
            if not_finite
            else "its tensors are not those that were written, since their checksum is another one",
        )
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, from its header. Raises as `read_tensors` does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> TrainingDataError:
    what = "damaged" if path.exists() else "missing"
    delete = "Delete it and start" if path.exists() else "Start"
    return TrainingDataError(
        f"the cached file {path} is {what}: {reason}. {delete} again, with --resume latest if there are checkpoints: "
        "it is then made anew."
    )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    def parts() -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

    return checksum(parts())


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TrainingDataError(
            f"settings that name a file must be what JSON can say (numbers, strings, flags, lists, mappings): {error}."
        ) from error
