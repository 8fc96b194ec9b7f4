"""Runs the command in a process of its own, also with packages of the test in the way of the installed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .. import launching
from ..documents import ROOT


def command(*arguments: str, first: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m diffusers_attn`.

    Args:
        first: a folder whose packages come before the installed ones.
        environment: further environment variables.
    """
    path = os.pathsep.join(map(str, [*([first] if first else []), ROOT]))
    return launching.run(
        [sys.executable, "-m", "diffusers_attn", *arguments], env={**os.environ, "PYTHONPATH": path, **environment}
    )


def doctor(first: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON object of `doctor` with the packages of a folder in the way."""
    done = command("doctor", "--json", *arguments, first=first)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def package(
    folder: Path, module: str, code: str = "", *, name: str | None = None, version: str = "1.0", requires: str = ""
) -> Path:
    """Writes a package with metadata into a folder, as pip would install it. Returns the folder of the module."""
    name = name or module
    path = folder.joinpath(*module.split("."))
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").write_text(textwrap.dedent(code))
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    return path
