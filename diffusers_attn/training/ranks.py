"""All processes of a job as those see it that only divide work among them and wait for each other."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..context_parallel.comm import rank_progress


class Ranks:
    """The processes of an `accelerate.Accelerator`. Every method is to be called on all of them.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    def barrier(self) -> None:
        """Returns when all are here."""
        with self._waiting():
            self._accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one of them: the same answer on all."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all of them of numbers of which each has as many. Waits for the device."""
        if self.size == 1:
            return values
        mine = torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)
        with self._waiting():
            return self._accelerator.reduce(mine, reduction="sum").tolist()

    def everyone(self, said: Any) -> list[Any]:
        """What every process says, in their order: anything that pickles."""
        if self.size == 1:
            return [said]
        answers: list[Any] = [None] * self.size
        with self._waiting():
            torch.distributed.all_gather_object(answers, said)
        return answers

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within, an error because a process does not come names it."""
        return rank_progress.waiting_for(range(self.size))
