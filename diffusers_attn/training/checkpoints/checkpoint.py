"""Atomic checkpoints.

A checkpoint is written to a folder named as unfinished, flushed to disk, and renamed, which is atomic. A kill at any
moment leaves the earlier checkpoints intact, and every folder with a checkpoint's name is complete. Old checkpoints are
renamed before they are deleted, for the same reason. Checksums of all files detect damage before a run is resumed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ...atomic_files import flush_to_disk
from ..data.disk import writing
from ..errors import TrainingError
from .manifest import damage, write_manifest

_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished-"


class Checkpoints:
    """The checkpoints of a run, in a folder of their own.

    Args:
        folder: created when the first checkpoint is saved.
        keep: number of newest checkpoints to keep; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(each.name) for each in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, which need not exist."""
        return self.folder / f"step-{step:08d}"

    def owns(self, checkpoint: Path) -> bool:
        """Whether the path `checkpoint` lies in this folder, also through links or relative paths."""
        return checkpoint.resolve().parent == self.folder.resolve()

    def newest(self) -> Path | None:
        """The newest checkpoint; None if there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    @staticmethod
    def step_of(path: Path) -> int:
        """Step of the checkpoint at `path`, from its name."""
        name = _NAME.fullmatch(path.name)
        assert name is not None
        return int(name[1])

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from.

        Args:
            wanted: "latest" (None is returned if there is no checkpoint yet), the number of a step, a folder, or None.

        Raises:
            TrainingError: there is no such checkpoint, or one of its files is damaged.
        """
        if wanted is None:
            return None
        if wanted == "latest":
            newest = self.newest()
            return None if newest is None else self._undamaged(newest)
        path = self.path(int(wanted)) if wanted.isdigit() else Path(wanted)
        if not path.is_dir() or not _NAME.fullmatch(path.name):
            there = ", ".join(map(str, self.steps())) or "none"
            raise TrainingError(
                f"resume={wanted!r}: there is no checkpoint at {path}. Accepted are 'latest', a step (in "
                f"{self.folder}: {there}), or a checkpoint's folder."
            )
        return self._undamaged(path)

    def _undamaged(self, path: Path) -> Path:
        """Returns `path` if none of the checkpoint's files is damaged, else raises TrainingError."""
        problem = damage(path)
        if problem is None:
            return path
        folder = Checkpoints(path.parent, None)  # may be the folder of another run
        others = (folder.path(step) for step in reversed(folder.steps()) if folder.path(step) != path)
        newest = next((each for each in others if damage(each) is None), None)
        if newest is None:
            advice = f"{path.parent} has no other undamaged checkpoint: start anew with another --output_dir."
        else:
            wanted = self.step_of(newest) if newest.parent == self.folder else newest
            advice = f"Resume from the newest undamaged one: --resume {wanted}."
        raise TrainingError(f"the checkpoint {path} is damaged: {problem}. {advice}")

    def save(self, step: int, write: Callable[[Path], None], size: int | None = None) -> Path:
        """Saves the checkpoint of `step`. On one process only.

        Args:
            write: writes the files into the empty folder that it gets.
            size: size of the checkpoint in bytes, for the message if the disk is full.

        Returns:
            The checkpoint's folder.

        Raises:
            WritingError: the checkpoint cannot be written. Earlier checkpoints stay.
        """
        path, newest = self.path(step), self.newest()
        scratch = self.folder / f"{_UNFINISHED}{step:08d}"
        left = "" if newest is None else f"The previous checkpoint, {newest}, is complete."
        with writing(f"the checkpoint of step {step}", path, size, left):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            scratch.mkdir()
            try:
                write(scratch)
                write_manifest(scratch)
                for file in scratch.rglob("*"):
                    flush_to_disk(file)
                flush_to_disk(scratch)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)  # frees the space
                raise
            if path.exists():  # of an earlier run that was resumed from before it
                self._discard(path)
            os.rename(scratch, path)
            flush_to_disk(self.folder)
            self.tidy()
        return path

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints of steps after `step`, which a run resumed from `step` replaces."""
        for later in self.steps():
            if later > step:
                self._discard(self.path(later))

    def tidy(self) -> None:
        """Deletes unfinished checkpoints and all but the newest complete ones. On one process only."""
        if self.folder.is_dir():
            for each in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(each)
        if self.keep is not None:
            for old in self.steps()[: -self.keep]:
                self._discard(self.path(old))

    def _discard(self, path: Path) -> None:
        leaving = self.folder / f"{_UNFINISHED}old-{path.name}"
        os.rename(path, leaving)
        shutil.rmtree(leaving)
