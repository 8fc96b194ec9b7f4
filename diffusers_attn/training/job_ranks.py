"""All processes of a job, for code that only divides work among them and synchronises them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..context_parallel.comm import rank_progress
from ..context_parallel.comm.everyone import everyone


class JobRanks:
    """The processes of an `accelerate.Accelerator`. Every method is collective: all processes must call it.

    Attributes:
        rank: rank of this process, from 0.
        size: number of processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    def barrier(self) -> None:
        """Waits until all processes have called this."""
        with self.waiting():
            self._accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is true on at least one process."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sums of `values` over all processes, in float32. Waits for the device."""
        if self.size == 1:
            return values
        return self.sums(torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)).tolist()

    def sums(self, mine: Tensor) -> Tensor:
        """The element-wise sums of tensors over all processes. On a GPU, the host does not wait for them."""
        if self.size == 1:
            return mine
        with self.waiting():
            found: Tensor = self._accelerator.reduce(mine, reduction="sum")
        return found

    def everyone(self, value: Any) -> list[Any]:
        """The `value` of every process in rank order. Values are plain, see `plain_values`."""
        return [value] if self.size == 1 else everyone(value, [None])

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within this context, an error caused by a missing process names that process."""
        return rank_progress.waiting_for(range(self.size))
