"""The operating system, the NVIDIA driver and the compiler, from their own programs."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

_WSL_TOOL = "/usr/lib/wsl/lib/nvidia-smi"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Facts that need no Python package."""

    system: str
    """Such as "Linux", "Linux (WSL)", "Windows" or "Darwin"."""
    python: str
    executable: str
    driver: str | None
    """Version of the NVIDIA driver; None without one."""
    driver_cuda: str | None
    """The newest CUDA version that the driver supports, such as "12.8"."""
    gpus: tuple[str, ...]
    """Names of the NVIDIA GPUs that the driver lists."""
    nvcc: str | None
    """Version of the CUDA compiler, which building kernel packages needs; None if it is not found."""


def this_machine() -> Machine:
    driver, driver_cuda, gpus = _nvidia()
    return Machine(
        _system(), platform.python_version(), sys.executable, driver, driver_cuda, gpus, _nvcc()
    )  # fmt: skip


def _system() -> str:
    name = platform.system()
    return f"{name} (WSL)" if name == "Linux" and "microsoft" in platform.release().lower() else name


def _nvidia() -> tuple[str | None, str | None, tuple[str, ...]]:
    tool = shutil.which("nvidia-smi") or (_WSL_TOOL if os.path.exists(_WSL_TOOL) else None)
    listed = _output([tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]) if tool else None
    rows = [line.partition(", ") for line in (listed or "").splitlines() if ", " in line]
    if not tool or not rows:
        return None, None, ()
    cuda = re.search(r"CUDA Version: *([\d.]+)", _output([tool]) or "")
    return rows[0][0], cuda and cuda[1], tuple(name for _, _, name in rows)


def _nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    tool = shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin")))), None
    )
    release = re.search(r"release ([\d.]+)", _output([tool, "--version"]) or "") if tool else None
    return release and release[1]


def _output(command: list[str]) -> str | None:
    """What a program prints; None if it fails or takes longer than 20 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
