"""The output folder of a run. It is locked during the run, and an earlier run's files are not replaced unasked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..data.lock import FolderLock
from ..data.ranks import Ranks, in_step
from ..data.walk import RUN_MARK
from ..errors import TrainingError
from ..model.comfyui import FILE as COMFYUI_FILE
from ..model.experts import EXPERT_OF
from ..model.lora import LORA_FILE
from ..settings.flag_names import option
from ..settings.run_file import RESOLVED

RESULTS = (
    "README.md", LORA_FILE, COMFYUI_FILE, "adapter_model.safetensors", "adapter_config.json",
    *EXPERT_OF.values(), "transformer", "transformer_2", "unet",
)  # fmt: skip
"""Files and folders that a run writes at its end."""
ALONG_THE_WAY = ("metrics.jsonl", "loss.png", "samples", RESOLVED)
"""Files that a run writes before its end, besides checkpoints."""


def check_output(folder: Path, own: bool, overwrite: bool) -> None:
    """Raises TrainingError if a run would replace files of others.

    Args:
        folder: `output_dir`.
        own: whether this run resumes one that wrote to this folder.
        overwrite: whether files may be replaced.
    """
    if own or overwrite:
        return
    names = RESULTS if (folder / RUN_MARK).exists() else RESULTS + ALONG_THE_WAY
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise TrainingError(
            f"{option('output_dir', str(folder))} already has {', '.join(there)}, which this run would replace. Give "
            "another folder, or --overwrite."
        )


@contextlib.contextmanager
def output_of_this_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Holds a lock on `folder` within this context. All ranks must call this.

    Raises:
        TrainingError: another run holds the lock; the message names its process.
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

    in_step(ranks, [None] if ranks.rank == 0 else [], take, "locking the output folder")
    try:
        yield
    finally:
        for lock in locks:
            lock.release()
