"""What is said while training goes on: a line for the eye, numbers for trackers and in a file."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .data.disk import write_file


class MetricsFile:
    """A line of JSON for each entry: its step, and numbers by name. It can be read while it grows.

    A run that is resumed goes on in it as if it had never ended: entries of steps behind the checkpoint, which come
    again, are taken out, and so is a line that a kill cut off.

    Args:
        path: is made anew where the run begins with the first step.
        first: the step from which it goes on.
    """

    def __init__(self, path: Path, first: int) -> None:
        before = path.read_text().splitlines() if first and path.is_file() else []
        text = "".join(f"{line}\n" for line in before if _step(line) <= first)

        def write(unfinished: Path) -> None:
            unfinished.write_text(text)

        write_file(path, write)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """An entry."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing follows."""
        self._file.close()


def _step(line: str) -> float:
    """Of an entry; of one that is cut off, a step that never comes."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Progress:
    """A bar with loss, learning rate, tokens per second, memory and time left, on one process; trackers through
    Accelerate; a file.

    Args:
        accelerator: whose trackers were started.
        steps: of the whole run.
        first: the step from which it goes on.
        every: steps between lines and entries.
        metrics: a `MetricsFile` to be made there, by one process; None is none.
    """

    def __init__(self, accelerator: Any, steps: int, first: int, every: int, metrics: Path | None = None) -> None:
        from tqdm import tqdm

        self.every = every
        self._accelerator = accelerator
        self._metrics = MetricsFile(metrics, first) if metrics is not None and accelerator.is_main_process else None
        if accelerator.device.type == "cuda":  # what encoding took is not what training takes
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
        self._began = time.perf_counter()
        self._tokens = self._steps = 0

    def step(self, number: int, numbers: Mapping[str, float], tokens: int) -> None:
        """Behind step `number`, counted from 1.

        Args:
            numbers: "loss", "learning rate", "gradient norm".
            tokens: that all processes trained on in this step.
        """
        self._tokens += tokens
        self._steps += 1
        self._bar.update(1)
        if number % self.every:
            return
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        rate = self._tokens / seconds
        values = {
            **numbers,
            "seconds per step": seconds / self._steps,
            "tokens per second": rate,
            "memory GB": peak_memory(self._accelerator.device) / 1e9,
        }
        self._began, self._tokens, self._steps = now, 0, 0
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning rate']:.1e}, {rate:.0f} tok/s, "
            f"{values['memory GB']:.1f} GB",
            refresh=False,
        )
        self.log(number, values)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """An entry for trackers and the file."""
        self._accelerator.log(values, step=number)
        if self._metrics is not None:
            self._metrics.write(number, values)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no part of any step's time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def say(self, message: str) -> None:
        """A line above the bar, on one process."""
        if self._accelerator.is_main_process:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Ends the line and the file."""
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU, the most that tensors took since training began; otherwise, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
