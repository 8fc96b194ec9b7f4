"""Plain values as bytes that ranks send to each other, and back: JSON, and no pickle, which would run what it receives.

Accepted are None, bools, numbers, texts, dtypes, lists, tuples and dicts of these, and the package's own NamedTuples.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch

_PACKAGE = __name__.partition(".")[0]


def to_bytes(value: Any) -> bytes:
    """Raises TypeError for another kind of value."""
    return json.dumps(_tagged(value)).encode()


def from_bytes(data: bytes) -> Any:
    """The value with the types that it had. Raises ValueError for what `to_bytes` has not made."""
    return _untagged(json.loads(data))


def _tagged(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [_tagged(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[_tagged(key), _tagged(each)] for key, each in value.items()]}
    if isinstance(value, tuple):
        items = [_tagged(each) for each in value]
        cls = type(value)
        if not hasattr(cls, "_fields"):
            return {"tuple": items}
        if cls.__module__.partition(".")[0] == _PACKAGE:
            return {"class": [cls.__module__, cls.__qualname__], "fields": items}
    raise TypeError(f"a {type(value).__name__} is no plain value that ranks can exchange: {value!r}")


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(each) for each in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"dict": pairs}:
            return {_untagged(key): _untagged(each) for key, each in pairs}
        case {"dtype": str(name)} if isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        case {"tuple": items}:
            return tuple(_untagged(each) for each in items)
        case {"class": [str(module), str(name)], "fields": items} if module.partition(".")[0] == _PACKAGE:
            cls = getattr(importlib.import_module(module), name, None)
            if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
                return cls(*(_untagged(each) for each in items))
    raise ValueError(f"another rank has sent no plain value: {str(value)[:200]}")
