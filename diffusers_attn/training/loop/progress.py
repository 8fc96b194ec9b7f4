"""Progress of a run: a bar on the terminal, and log entries in a file and for experiment trackers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.disk import write_file


class MetricsFile:
    """A file of log entries, one JSON object per line, with the step and numbers by name.

    When a run is resumed, entries of steps after the checkpoint are removed, since these steps run again. An incomplete
    last line is removed too.

    Args:
        path: the file; overwritten if `first` is 0.
        first: step of the checkpoint, 0 for a new run.
    """

    def __init__(self, path: Path, first: int) -> None:
        before = path.read_text().splitlines() if first and path.is_file() else []
        text = "".join(f"{line}\n" for line in before if _step(line) <= first)

        def write(unfinished: Path) -> None:
            unfinished.write_text(text)

        write_file(path, write)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends an entry."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: str) -> float:
    """The step of an entry; infinity for an incomplete line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A progress bar on rank 0 with loss, learning rate, tokens per second, memory and remaining time; and log entries.

    Args:
        accelerator: an `accelerate.Accelerator` with started trackers.
        steps: number of steps of the whole run.
        first: step of the checkpoint, 0 for a new run.
        every: number of steps between log entries.
        metrics: path of the `MetricsFile`, which rank 0 writes. None: no file.
    """

    def __init__(self, accelerator: Any, steps: int, first: int, every: int, metrics: Path | None = None) -> None:
        from tqdm import tqdm

        self.every = every
        self._accelerator = accelerator
        self._metrics = MetricsFile(metrics, first) if metrics is not None and accelerator.is_main_process else None
        if accelerator.device.type == "cuda":  # leaves out the memory of encoding
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self._bar = tqdm(
            total=steps,
            initial=first,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            file=sys.stderr,
            desc="training",
            unit="step",
        )
        self._tokens = self._steps = 0
        self._seconds = 0.0

    def step(self, number: int, numbers: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Updates the bar after a step, and writes a log entry if one is due.

        Args:
            number: number of the step, from 1.
            numbers: "loss", "learning rate" and "gradient norm".
            tokens: number of tokens that all processes trained on in this step.
            seconds: time from the end of the step before, or from the work between them.
        """
        self._tokens += tokens
        self._steps += 1
        self._seconds += seconds
        self._bar.update(1)
        if number % self.every:
            return
        seconds = max(self._seconds, 1e-9)
        rate = self._tokens / seconds
        values = {
            **numbers,
            "seconds per step": seconds / self._steps,
            "tokens per second": rate,
            "memory GB": peak_memory(self._accelerator.device) / 1e9,
        }
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning rate']:.1e}, {rate:.0f} tok/s, "
            f"{values['memory GB']:.1f} GB",
            refresh=False,
        )
        self.log(number, values)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Writes an entry to the trackers and the file."""
        self._accelerator.log(values, step=number)
        if self._metrics is not None:
            self._metrics.write(number, values)

    def print(self, message: str) -> None:
        """Prints a line above the bar on rank 0."""
        if self._accelerator.is_main_process:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Closes the bar and the file."""
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a GPU, of its tensors since training began; on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
