"""Kernels with the layout of the Hub's, built for the CPU from the files of this folder.

The package `kernels` loads them from local folders, named in the environment variable LOCAL_KERNELS.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

HERE = Path(__file__).parent
# Repository, name, the file here, its name in the kernel, and what the kernel exports of it.
KERNELS = (
    ("kernels-community/flash-attn2", "flash-attn2", "flash_attn2.py", "flash_attn_interface", ""),
    ("kernels-community/flash-attn3", "flash-attn3", "flash_attn3.py", "flash_attn_interface", ""),
    ("SageAttention/sage-attention", "sage-attention", "sage_attention.py", "core", "sageattn"),
    ("SageAttention/sage-blackwell", "sage-blackwell", "sage_blackwell.py", "api", "sageattn3_blackwell"),
)


def build(folder: Path, backend: str = "cpu") -> str:
    """Writes the kernels' repositories into `folder`. Returns the value for LOCAL_KERNELS."""
    entries = []
    for repo, name, source, module, exported in KERNELS:
        variant = folder / name / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        # Unique, as on the Hub: a process may load several builds, each with operators of its own.
        identifier = f"{name.replace('-', '_')}_{backend}_{zlib.crc32(str(folder).encode())}"
        metadata = {
            "name": name, "id": identifier, "version": 1, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata))
        shutil.copy(HERE / source, variant / f"{module}.py")
        shutil.copy(HERE / "attention.py", variant)
        (variant / "_ops.py").write_text(f"def add_op_namespace_prefix(name):\n    return f'{identifier}::{{name}}'\n")
        names = f"from .{module} import {exported}\n" if exported else f"from . import {module}\n"
        (variant / "__init__.py").write_text(names)
        entries.append(f"{repo}={folder / name}")
    return ":".join(entries)
