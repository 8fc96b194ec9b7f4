"""Nested values with tensors, as a safetensors file and a JSON file: the state of an optimizer, without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...context_parallel.comm import plain_values

_TENSOR = "\x00tensor"
"""Begins the tuple that stands for a tensor in the JSON file."""


def write(value: Any, path: Path) -> None:
    """Writes a value to `path` with the suffixes .safetensors and .json.

    Raises:
        TypeError: it has something else than tensors, dicts, lists, tuples, numbers, texts and None.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def without_tensors(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
            return (_TENSOR, name)
        if isinstance(value, dict):
            return {key: without_tensors(each) for key, each in value.items()}
        return type(value)(map(without_tensors, value)) if type(value) in (list, tuple) else value

    text = plain_values.to_bytes(without_tensors(value))
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_bytes(text + b"\n")


def read(path: Path) -> Any:
    """The value that `write` has written.

    Raises:
        OSError: a file cannot be read.
        ValueError, KeyError: they are not such files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path.with_suffix(".safetensors"))
    except SafetensorError as error:
        raise ValueError(f"{path.with_suffix('.safetensors')}: {error}") from error

    def with_tensors(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and value[0] == _TENSOR:
            return tensors[value[1]]
        if isinstance(value, dict):
            return {key: with_tensors(each) for key, each in value.items()}
        return type(value)(map(with_tensors, value)) if type(value) in (list, tuple) else value

    return with_tensors(plain_values.from_bytes(path.with_suffix(".json").read_bytes()))
