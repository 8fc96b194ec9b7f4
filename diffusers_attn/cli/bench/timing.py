"""Times calls on a CPU or a GPU, in turns, so that a hot device or a busy neighbour affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 4
"""Number of turns of each call."""
BATCH_SECONDS = 0.02
"""Calls are timed in batches of about this duration. On a GPU, the host then launches ahead of the kernels."""

Call = Callable[[], object]


def milliseconds(
    calls: Mapping[str, Call], device: torch.device, seconds: float, progress: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Median milliseconds of each call.

    Args:
        calls: by name. Each has run before, so that nothing is left to compile.
        device: the device of the calls.
        seconds: time to measure each call in total. A call that takes longer is measured once.
        progress: called with a name before its turn.
    """
    first = {name: batch_seconds(call, 1, device) for name, call in calls.items()}
    sizes = {name: max(1, int(BATCH_SECONDS / max(took, 1e-7))) for name, took in first.items()}
    times: dict[str, list[float]] = {name: [took] if took > seconds else [] for name, took in first.items()}
    short = [name for name in calls if not times[name]]
    for turn in range(ROUNDS):
        for name in short[:: 1 if turn % 2 == 0 else -1]:
            progress(name)
            batch_seconds(calls[name], 1, device)  # the caches hold the data of the previous call
            spent = 0.0
            while spent < seconds / ROUNDS or not times[name]:
                took = batch_seconds(calls[name], sizes[name], device)
                times[name].append(took / sizes[name])
                spent += took
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def batch_seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds of `repeats` calls."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return time.perf_counter() - begin
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    begin_event.record(stream)
    for _ in range(repeats):
        call()
    end_event.record(stream)
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def synchronize(device: torch.device) -> None:
    """Waits until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of large matrix products in this dtype, in TFLOP/s: the peak to compare attention with."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    with torch.no_grad():
        found = milliseconds({"": lambda: torch.matmul(left, right, out=out)}, device, 0.2)
    return 2 * size**3 / found[""] / 1e9
