"""Runs a training script as it is, and writes times and memory of its steps.

    python step_timer.py result.json 24 train.py --its arguments

The script is ended after the given number of steps. The time of a step is the time between the ends of two calls of an
optimizer's `step`: on a GPU by events, so that nothing waits for the measurement. `peak_mib` counts tensors on the GPU
from the first step on, `reserved_mib` what the allocator holds. `losses` are those that the script gives to
`Accelerator.log`, as "loss" or "loss/current".
"""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook


class Ended(BaseException):
    """The script has made all steps that are measured."""


def main() -> None:
    result, steps, script = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(script).resolve().parent)
    cuda = torch.cuda.is_available()
    marks: list[Any] = []
    losses: list[float] = []

    def stepped(*_: Any) -> None:
        if cuda and not marks:
            torch.cuda.reset_peak_memory_stats()
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        if len(marks) == int(steps):
            raise Ended

    log = Accelerator.log

    def logged(self: Accelerator, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        losses.extend(float(values[name]) for name in ("loss", "loss/current") if name in values)
        log(self, values, *args, **kwargs)

    register_optimizer_step_post_hook(stepped)
    Accelerator.log = logged
    with contextlib.suppress(Ended):
        runpy.run_path(script, run_name="__main__")
    if cuda:
        torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]
    found: dict[str, Any] = {"seconds": [round(each, 4) for each in seconds], "losses": losses}
    if cuda:
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        found["reserved_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
