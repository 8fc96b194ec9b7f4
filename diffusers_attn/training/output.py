"""The folder that a run writes to: its own while it runs, and what was there before is not lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .data.lock import FolderLock
from .data.ranks import Ranks, in_step
from .data.walk import RUN_MARK
from .errors import TrainingError
from .flag_names import option

RESULTS = ("README.md", "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
"""files that a run writes at its end."""
ALONG_THE_WAY = ("metrics.jsonl", "samples")
"""and what it writes before; an earlier run that came to no checkpoint leaves nothing else."""


def check_output(folder: Path, own: bool, overwrite: bool) -> None:
    """Raises TrainingError where a run would replace files that are not its own.

    Args:
        folder: `output_dir`.
        own: whether a run is resumed that wrote there.
        overwrite: whether they may be replaced.
    """
    if own or overwrite:
        return
    names = RESULTS if (folder / RUN_MARK).exists() else RESULTS + ALONG_THE_WAY
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise TrainingError(
            f"{option('output_dir', str(folder))} has {', '.join(there)} of before, which this run would replace. Give "
            "another folder, or --overwrite."
        )


@contextlib.contextmanager
def output_of_this_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Within, no other run writes to `folder`. All ranks must call this.

    Raises:
        TrainingError: another one does; says which.
    """
    locks = []

    def take(_: None) -> None:
        try:
            lock = FolderLock(folder)
            taken = lock.acquire()
        except OSError as error:
            raise TrainingError(f"{option('output_dir', str(folder))} cannot be locked: {error}") from error
        if not taken:
            raise TrainingError(
                f"{option('output_dir', str(folder))} is in use by another run: {lock.holder()}. Wait until it ends, "
                "or give another folder."
            )
        locks.append(lock)

    in_step(ranks, [None] if ranks.rank == 0 else [], take, "taking the output folder")
    try:
        yield
    finally:
        for lock in locks:
            lock.release()
