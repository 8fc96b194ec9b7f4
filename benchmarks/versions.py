"""What produced a figure: machine, packages and commit, to be written beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "flash-attn", "flash-attn-4", "sageattention", "xformers", "triton")

CPUS = Path("/proc/cpuinfo")


def versions(device: str, commit: str | None = None) -> dict[str, object]:
    """As plain JSON values. `commit` stands in where there is no git repository."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "device": name,
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "commit": commit or _head(),
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host() -> str:
    """The machine's CPUs in words, since their speed decides how fast kernels are launched."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = next(
            (line.partition(":")[2].strip() for line in CPUS.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return f"{len(os.sched_getaffinity(0))} CPUs ({model})"


def _head() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
