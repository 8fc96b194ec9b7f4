"""What is said while training goes on: a line for the eye, numbers for trackers."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch


class Progress:
    """A bar with loss, learning rate, tokens per second, memory and time left, on one process; trackers through
    Accelerate.

    Args:
        accelerator: whose trackers were started.
        steps: of the whole run.
        first: the step from which it goes on.
        every: steps between lines and entries.
    """

    def __init__(self, accelerator: Any, steps: int, first: int, every: int) -> None:
        from tqdm import tqdm

        self.every = every
        self._accelerator = accelerator
        self._bar = tqdm(
            total=steps,
            initial=first,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            file=sys.stderr,
            desc="training",
            unit="step",
        )
        self._began = time.perf_counter()
        self._tokens = 0

    def step(self, number: int, numbers: Mapping[str, float], tokens: int) -> None:
        """Behind step `number`, counted from 1.

        Args:
            numbers: "loss", "learning rate", "gradient norm".
            tokens: that all processes trained on in this step.
        """
        self._tokens += tokens
        self._bar.update(1)
        if number % self.every:
            return
        now = time.perf_counter()
        rate = self._tokens / max(now - self._began, 1e-9)
        self._began, self._tokens = now, 0
        values = {**numbers, "tokens per second": rate, "memory GB": peak_memory(self._accelerator.device) / 1e9}
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning rate']:.1e}, {rate:.0f} tok/s, "
            f"{values['memory GB']:.1f} GB",
            refresh=False,
        )
        self._accelerator.log(values, step=number)

    def say(self, message: str) -> None:
        """A line above the bar, on one process."""
        if self._accelerator.is_main_process:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, the most that tensors took so far; otherwise, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
