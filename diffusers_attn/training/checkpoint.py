"""Checkpoints that are there whole or not at all.

A checkpoint is written to a folder beside the others whose name says that it is unfinished, brought to the disk, and
then renamed, which a file system does as one thing. So a kill at any moment leaves the checkpoints that were there, and
every folder that has a checkpoint's name is one. Old ones are renamed before they are taken apart, for the same reason.
Every file has a checksum, by which damage is found before anything is resumed from it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..atomic_files import flush_to_disk
from .data.disk import writing
from .errors import TrainingError
from .manifest import damage, write_manifest

_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished-"


class Checkpoints:
    """The checkpoints of a run, in a folder of their own.

    Args:
        folder: is made when the first is saved.
        keep: how many of the newest stay; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(each.name) for each in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of these, however its path is written."""
        return checkpoint.resolve().parent == self.folder.resolve()

    def newest(self) -> Path | None:
        """The newest checkpoint; None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    @staticmethod
    def step_of(path: Path) -> int:
        """Of the checkpoint at `path`, by its name."""
        name = _NAME.fullmatch(path.name)
        assert name is not None
        return int(name[1])

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from.

        Args:
            wanted: "latest" is the newest, or none where there is none yet; a step's number; a folder; None is none.

        Raises:
            TrainingError: there is no such checkpoint, or one of its files is damaged.
        """
        if wanted is None:
            return None
        if wanted == "latest":
            newest = self.newest()
            return None if newest is None else self._whole(newest)
        path = self.path(int(wanted)) if wanted.isdigit() else Path(wanted)
        if not path.is_dir() or not _NAME.fullmatch(path.name):
            there = ", ".join(map(str, self.steps())) or "none"
            raise TrainingError(
                f"resume={wanted!r}: there is no checkpoint at {path}. Accepted are 'latest', a step (in "
                f"{self.folder}: {there}), or a checkpoint's folder."
            )
        return self._whole(path)

    def _whole(self, path: Path) -> Path:
        """The checkpoint at `path`, if none of its files is damaged."""
        problem = damage(path)
        if problem is None:
            return path
        beside = Checkpoints(path.parent, None)  # which may be those of another run
        others = (beside.path(step) for step in reversed(beside.steps()) if beside.path(step) != path)
        whole = next((each for each in others if damage(each) is None), None)
        if whole is None:
            advice = f"{path.parent} has no other checkpoint that is whole: start anew with another --output_dir."
        else:
            wanted = self.step_of(whole) if whole.parent == self.folder else whole
            advice = f"Go on from the newest that is whole: --resume {wanted}."
        raise TrainingError(f"the checkpoint {path} is damaged: {problem}. {advice}")

    def save(self, step: int, write: Callable[[Path], None], size: int | None = None) -> Path:
        """Saves the checkpoint of `step`. On one process only.

        Args:
            write: is given an empty folder and writes files into it.
            size: bytes that it needs, for a message where there is no room.

        Returns:
            Where it is.

        Raises:
            WritingError: it cannot be written. The checkpoints of before stay.
        """
        path, newest = self.path(step), self.newest()
        scratch = self.folder / f"{_UNFINISHED}{step:08d}"
        left = "" if newest is None else f"The checkpoint before, {newest}, is whole."
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
                shutil.rmtree(scratch, ignore_errors=True)  # and leave others the room
                raise
            if path.exists():  # of an earlier run that was resumed from before it
                self._discard(path)
            os.rename(scratch, path)
            flush_to_disk(self.folder)
            self.tidy()
        return path

    def discard_after(self, step: int) -> None:
        """Takes checkpoints of later steps away: those of a run that is given up by resuming from `step`."""
        for later in self.steps():
            if later > step:
                self._discard(self.path(later))

    def tidy(self) -> None:
        """Takes away what a kill left behind, and all but the newest. On one process only."""
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
