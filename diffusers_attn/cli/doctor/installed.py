"""The installed packages, from their metadata. Imports none of them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import importlib.machinery
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

WATCHED = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface-hub", "kernels",
    "torchvision", "torchaudio", "torchao", "bitsandbytes", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4",
    "nvidia-cutlass-dsl", "sageattention", "sageattn3", "xformers", "diffusers-attn",
)  # fmt: skip
"""The packages that the report names, if they are installed, and whose requirements are compared."""

MODULES = {"flash-attn-3": "flash_attn_interface", "flash-attn-4": "", "nvidia-cutlass-dsl": "", "diffusers-attn": ""}
"""The modules of packages whose name is another; empty for modules that may be elsewhere."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One installed package."""

    name: str
    version: str
    requires: tuple[str, ...] = ()
    """Requirements, as in the metadata: `torch==2.11.0; extra == "gpu"`."""
    copies: tuple[str, ...] = ()
    """Folders with metadata of this package, in the order in which Python searches them."""
    changed_files: tuple[str, ...] = ()
    """Python files that differ from those that the package installed, among those that packages are known to share."""
    hidden_by: str | None = None
    """The file that Python imports instead of the package, if another one of its name comes first."""
    built_for_cuda: str | None = None
    """CUDA version that its binaries were compiled for, such as "12.8", where the package records it."""


def installed(names: tuple[str, ...] = WATCHED) -> dict[str, Package]:
    """The installed ones of these packages, by canonical name. Packages with unreadable metadata are left out."""
    found: dict[str, list[importlib.metadata.Distribution]] = {}
    wanted = set(names)
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # damaged metadata raises any type
            name: str = canonicalize_name(distribution.metadata["Name"])
            if name in wanted and distribution.version:
                found.setdefault(name, []).append(distribution)
    packages = {}
    for name, copies in found.items():
        with contextlib.suppress(Exception):
            packages[name] = _package(name, copies)
    return dict(sorted(packages.items()))


def _package(name: str, copies: list[importlib.metadata.Distribution]) -> Package:
    first = copies[0]
    folders = tuple(dict.fromkeys(str(Path(str(each.locate_file(""))).resolve()) for each in copies))
    return Package(
        name,
        first.version,
        tuple(first.requires or ()),
        folders,
        _changed_files(first) if name == "flash-attn-4" else (),
        None if _is_editable(first) else _hidden_by(name, folders),
        _xformers_cuda(first) if name == "xformers" else None,
    )


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    """Whether the code is elsewhere than the metadata."""
    return "editable" in (distribution.read_text("direct_url.json") or "")


def _hidden_by(name: str, folders: tuple[str, ...]) -> str | None:
    """The file that Python imports by the name of a package that is installed in these folders, if it is another."""
    module = MODULES.get(name, name.replace("-", "_"))
    try:
        spec = importlib.machinery.PathFinder.find_spec(module) if module else None  # imports nothing
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        return None
    origin = Path(str(spec.origin)).resolve()
    return None if any(origin.is_relative_to(folder) for folder in folders) else str(origin)


def _changed_files(distribution: importlib.metadata.Distribution) -> tuple[str, ...]:
    """The Python files of flash-attn-4 whose content is not the installed one: flash-attn 2 has files of the same
    names."""
    changed = []
    for file in distribution.files or ():
        if file.suffix != ".py" or file.hash is None or file.hash.mode != "sha256":
            continue
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                changed.append(str(file))
    return tuple(changed)


def _xformers_cuda(distribution: importlib.metadata.Distribution) -> str | None:
    """The CUDA version that xformers records in `cpp_lib.json`: 1208 stands for 12.8."""
    path = Path(str(distribution.locate_file("xformers/cpp_lib.json")))
    try:
        built: Mapping[str, Any] = json.loads(path.read_text())
        number = int(built["version"]["cuda"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{number // 100}.{number % 100}"
