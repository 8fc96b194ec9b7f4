"""A file of speeds measured on this machine. `diffusers-attn bench --save FILE` writes it.

It is read where the environment variable `DIFFUSERS_ATTN_SPEEDS` names it. All ranks of a job need the same speeds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..atomic_files import write_atomically
from ..errors import AttentionProviderError
from ..json_files import read_json

SETTING = "DIFFUSERS_ATTN_SPEEDS"
SCHEMA = "diffusers-attn/speeds/1"

Table = dict[str, tuple[float, float]]
"""TFLOP/s by provider, at short and at long sequences."""
Tables = dict[tuple[tuple[int, int], int], Table]
"""By compute capability and the largest head_dim."""


def tables() -> Tables:
    """The speeds of the file that the environment names; empty without one.

    Raises:
        AttentionProviderError: the file cannot be read, or is not such a file.
    """
    path = os.environ.get(SETTING, "")
    return _read_once(path) if path else {}


def fingerprint() -> str:
    """A digest of the speeds in the file, to compare ranks with; "none" without a file."""
    found = tables()
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16] if found else "none"


@functools.cache
def _read_once(path: str) -> Tables:
    try:
        return read(Path(path).expanduser())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AttentionProviderError(
            f"the environment has {SETTING}={path}, and this file of measured speeds cannot be used: "
            f"{type(error).__name__}: {error}. Write it with `diffusers-attn bench --save {path}`, or unset it."
        ) from error


def read(path: Path) -> Tables:
    """The speeds in a file.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError: it is not such a file.
    """
    content = read_json(path)
    if content["schema"] != SCHEMA:
        raise ValueError(f"its schema is {content['schema']!r}, and {SCHEMA!r} is accepted")
    found: Tables = {}
    for each in content["tables"]:
        major, minor = each["compute_capability"]
        speeds = {name: (float(short), float(long)) for name, (short, long) in each["tflops"].items()}
        if not all(value > 0 for pair in speeds.values() for value in pair):
            raise ValueError("a speed is not positive")
        found[(int(major), int(minor)), int(each["head_dim"])] = speeds
    return found


def write(path: Path, found: Tables, environment: dict[str, Any]) -> None:
    """Writes speeds into a file. Those of other GPUs, sizes and providers that are in it stay.

    Args:
        environment: device and versions with which they were measured, for readers.

    Raises:
        AttentionProviderError: the file exists and is not such a file.
        OSError: the file cannot be written.
    """
    kept: Tables = {}
    if path.exists():
        try:
            kept = read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AttentionProviderError(
                f"{path} exists and is no file of measured speeds ({type(error).__name__}: {error}). Name another."
            ) from error
    merged = {key: {**kept.get(key, {}), **found.get(key, {})} for key in sorted({*kept, *found})}
    listed = [
        {"compute_capability": list(capability), "head_dim": head_dim, "tflops": speeds}
        for (capability, head_dim), speeds in merged.items()
    ]
    text = json.dumps({"schema": SCHEMA, "measured_with": environment, "tables": listed}, indent=1)
    write_atomically(path, lambda scratch: scratch.write_text(text + "\n"))
