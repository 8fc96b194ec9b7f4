"""The settings of a run, which go from the command to its processes. Imports no PyTorch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """One call of a pipeline."""

    model: str
    """A folder, or a repository on the Hugging Face Hub."""
    call: dict[str, Any]
    """Arguments of the pipeline's call by name, without the generator."""
    output: str
    """A .png file for an image; for a video a .mp4 file, or a new folder for its frames."""
    fps: int
    seed: int
    device: str
    """"cuda" or "cpu"."""
    processes: int
    dtype: str
    provider: str | None
    """Attention provider; None for the default of `enable_context_parallel`, or "auto" on one process."""
    compile: bool
    """Whether the blocks of the denoisers are compiled; a call with two steps then precedes the measured one."""
    shard_weights: bool
    profile: str | None = None
    """A file for the trace of the measured call; ranks other than the first add their number to its name."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Settings:
        return cls(**json.loads(path.read_text()))
