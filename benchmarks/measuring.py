"""Measures time and memory of steps, and writes the file of results."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from versions import versions

from diffusers_attn.atomic_files import write_atomically

MIB = 2**20


def step_milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    if device.type == "cpu":
        clock = []
        for _ in range(steps + 1):
            step()
            clock.append(time.perf_counter())
        return [(after - before) * 1e3 for before, after in itertools.pairwise(clock)]
    events = []
    for _ in range(steps + 1):
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def memory_taken(device: torch.device) -> tuple[int, int]:
    """Bytes allocated to tensors, and bytes of the device in use outside PyTorch's allocator."""
    if device.type == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved()


def profiled(step: Callable[[], Any]) -> dict[str, Any] | None:
    """The kernels of a step that take longest, and the time in which any kernel runs; None if there are no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    if not spans:
        return None
    total: dict[str, list[float]] = {}
    busy, until = 0.0, spans[0][0]
    for start, end, name in spans:
        each = total.setdefault(name[:100], [0, 0.0])
        each[0], each[1] = each[0] + 1, each[1] + (end - start) / 1e3
        busy, until = busy + max(0.0, end - max(start, until)) / 1e3, max(until, end)
    longest = sorted(total.items(), key=lambda item: -item[1][1])[:16]
    return {
        "busy_ms": round(busy, 2),
        "from_first_to_last_ms": round((until - spans[0][0]) / 1e3, 2),
        "launches": sum(int(count) for count, _ in total.values()),
        "longest": [{"name": name, "times": int(count), "ms": round(ms, 2)} for name, (count, ms) in longest],
    }


def dynamo_counts() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


@contextlib.contextmanager
def diffusers_on_cpu() -> Iterator[None]:
    """Makes diffusers 0.42 run on a CPU, where its queries for the accelerator fail."""
    with (
        mock.patch.object(torch.accelerator, "device_count", lambda: 1),
        mock.patch.object(torch._C, "_get_accelerator", lambda *_: torch.device("cpu")),
    ):
        yield


class Job(Protocol):
    """The processes of a benchmark: `ranks.Ranks`, or a single process that starts jobs."""

    rank: int
    size: int
    device: torch.device


class Report:
    """The file of results, which rank 0 rewrites after each change."""

    def __init__(self, path: Path | None, ranks: Job, args: argparse.Namespace) -> None:
        self.path = path if ranks.rank == 0 else None
        self.variants: list[Any] = []
        """Objects with a `result`."""
        self.environment: dict[str, Any] = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "ranks": ranks.size,
            "blocks_compiled": args.compile,
            **versions(ranks.device.type, args.commit),
        }
        if ranks.device.type == "cuda":
            self.environment["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            self.environment["cudnn"] = torch.backends.cudnn.version()

    def write(self) -> None:
        if self.path is not None:
            report = {"environment": self.environment, "results": [variant.result for variant in self.variants]}
            text = json.dumps(report, indent=1) + "\n"
            write_atomically(self.path, lambda unfinished: unfinished.write_text(text))
