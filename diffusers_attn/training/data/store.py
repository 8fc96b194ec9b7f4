"""Tensors in safetensors files, each named by a hash of everything that determines its content.

So an existing file is never outdated: other settings or other data have other names. Each file has a checksum, which
is compared whenever the file is read.
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
from ...json_files import parse_json
from .disk import checksum, write_file
from .errors import TrainingDataError

_ABOUT = "diffusers_attn"
"""Entry in a file's metadata: a JSON object with `key`, `made_from` and the tensors' `crc32`."""


def hash_of(made_from: Mapping[str, Any]) -> str:
    """A hash of JSON values.

    Args:
        made_from: JSON values that determine a file's content; the order of keys does not matter.

    Returns:
        64 hexadecimal digits.

    Raises:
        TrainingDataError: a value cannot be stored as JSON.
    """
    return hashlib.sha256(_json(made_from).encode()).hexdigest()


class TensorStore:
    """A folder of files with tensors. Any number of processes may write to it.

    Args:
        folder: the folder; created when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Path of the file for a key, which need not exist."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the file for a key exists and has the right length, key and a checksum. Does not read tensors."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                about = parse_json((file.metadata() or {})[_ABOUT])
                return about["key"] == key and "crc32" in about
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return False

    def write(self, key: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
        """Writes a file atomically. `made_from` is stored in its metadata, as information for people."""
        from safetensors.torch import save_file

        copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # One entry, since safetensors writes several in varying order.
        metadata = {_ABOUT: _json({"key": key, "made_from": made_from, "crc32": _checksum(copies)})}
        write_file(self.path(key), lambda path: save_file(copies, path, metadata))

    def remove_unfinished(self) -> None:
        """Removes incomplete files of killed processes."""
        remove_unfinished(self.folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file.

    Raises:
        TrainingDataError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(about, dict) or about.get("crc32") != _checksum(tensors):
        not_finite = [name for name, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]
        raise _damaged(
            path,
            f"NaN or infinity in {', '.join(not_finite)}" if not_finite else "the checksum of its tensors has changed",
        )
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of all tensors from a file's header. Raises as `read_tensors` does."""
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
        f"the cached file {path} is {what}: {reason}. {delete} again, with --resume latest if there are checkpoints; "
        "the file is then computed again."
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
            f"settings of the cache must be JSON values (finite numbers, strings, booleans, lists, mappings): {error}."
        ) from error
