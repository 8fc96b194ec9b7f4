"""Divides the time of a trace among components, attention and exchanges, so that the parts add up to the whole.

A trace is that of `torch.profiler`, as `export_chrome_trace` writes it. Without a GPU, each moment of the thread that
runs the pipeline belongs to what encloses it: an exchange, otherwise an attention call, otherwise the component alone.
On a GPU, each moment belongs to the kernels that run. Attention comes before other computation, and both before an
exchange, which is then hidden. A moment without kernels waits for the host to launch the next one.
"""

from __future__ import annotations

import bisect
import collections
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...spans import ALL, ATTENTION, COMPONENT, EXCHANGE, PREFIX, SEPARATOR
from .names import IDLE, OTHER, Label, of_kernel, of_operator, of_span

_ON_HOST = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_PRIORITY = (ATTENTION, OTHER, EXCHANGE)
OUTSIDE = "outside of components"
_ALL_SPAN = SEPARATOR.join((PREFIX, ALL))
_COMPONENT = SEPARATOR.join((PREFIX, COMPONENT, ""))
Part = tuple[str, Label]
"""A component, and what happens in it."""


class Times(NamedTuple):
    """How the time of a trace is divided."""

    seconds: dict[Part, float]
    calls: dict[Part, int]
    """Number of attention calls and of exchanges; for the label "other", calls of the component."""
    total: float
    """Seconds of the whole profile."""
    hidden: float
    """Seconds of exchanges during computation, which are not in `seconds`."""
    from_graphs: int
    """Number of kernels that CUDA graphs launched."""


class _Interval(NamedTuple):
    start: float
    end: float
    part: Callable[[Part], Part]
    """The part of the time within, given that around it."""


class _Segments(NamedTuple):
    """The parts of one thread's time, one after another."""

    starts: list[float]
    parts: list[Part]

    def at(self, time: float) -> Part:
        index = bisect.bisect_right(self.starts, time) - 1
        return self.parts[index] if index >= 0 else (OUTSIDE, Label(OTHER))


def divide(events: Iterable[dict[str, Any]]) -> Times:
    """Divides the time of a trace.

    Args:
        events: the "traceEvents" of a chrome trace, with one span of the kind "profile" around everything.
    """
    complete = [each for each in events if each.get("ph") == "X"]
    full_span = next(each for each in complete if each["name"] == _ALL_SPAN and each.get("cat") == "user_annotation")
    start, end = float(full_span["ts"]), float(full_span["ts"]) + float(full_span["dur"])
    calls: collections.Counter[Part] = collections.Counter()
    by_thread: dict[Any, list[_Interval]] = collections.defaultdict(list)
    for each in complete:
        change = _change(each["name"]) if each.get("cat") in _ON_HOST else None
        if change is not None:
            began = float(each["ts"])
            by_thread[each["tid"]].append(_Interval(began, began + float(each["dur"]), change))
    threads = {thread: _segments(found, calls) for thread, found in by_thread.items()}
    own = threads.get(full_span["tid"], _Segments([], []))
    device = [each for each in complete if each.get("cat") in _ON_DEVICE]
    if device:
        launches = {
            each["args"]["correlation"]: each
            for each in complete
            if each.get("cat") in _LAUNCHES and "correlation" in each.get("args", {})
        }
        launched = [(each, launches.get(each.get("args", {}).get("correlation"), each)) for each in device]
        from_graphs = sum("GraphLaunch" in launch["name"] for _, launch in launched)
        seconds, hidden = _of_device(launched, threads, own, start, end)
    else:
        seconds, hidden, from_graphs = _of_thread(own, start, end), 0.0, 0
    return Times(seconds, dict(calls), (end - start) / 1e6, hidden, from_graphs)


@functools.lru_cache(maxsize=4096)
def _change(name: str) -> Callable[[Part], Part] | None:
    """How an event of this name changes the part of the time; None if it does not."""
    if name.startswith(_COMPONENT):
        component = name.removeprefix(_COMPONENT)
        return lambda around: (component, around[1]) if around[0] == OUTSIDE else around
    label = of_span(name) or of_operator(name)
    if label is None:
        return None

    def within(around: Part) -> Part:
        component, outer = around
        if outer.kind == EXCHANGE or (outer.kind == label.kind == ATTENTION):
            return around
        return component, label._replace(strategy=outer.strategy or label.strategy) if label.kind == EXCHANGE else label

    return within


def _segments(intervals: list[_Interval], calls: collections.Counter[Part]) -> _Segments:
    """The parts of one thread's time. Counts the outermost intervals of each part."""
    found = _Segments([], [])
    stack: list[tuple[float, Part]] = []
    here: Part = (OUTSIDE, Label(OTHER))

    def close(until: float) -> None:
        nonlocal here
        while stack and stack[-1][0] <= until:
            ended, here = stack.pop()
            found.starts.append(ended)
            found.parts.append(here)

    for each in sorted(intervals, key=lambda one: (one.start, -one.end)):
        close(each.start)
        inner = each.part(here)
        if inner != here:
            calls[inner] += 1
            stack.append((each.end, here))
            here = inner
            found.starts.append(each.start)
            found.parts.append(here)
    close(float("inf"))
    return found


def _of_thread(own: _Segments, start: float, end: float) -> dict[Part, float]:
    seconds: dict[Part, float] = collections.defaultdict(float)
    times = [start, *own.starts, end]
    parts: list[Part] = [(OUTSIDE, Label(OTHER)), *own.parts]
    for began, ended, part in zip(times, times[1:], parts):
        seconds[part] += max(0.0, min(ended, end) - max(began, start)) / 1e6
    return dict(seconds)


def _of_device(
    launched: list[tuple[dict[str, Any], dict[str, Any]]],
    threads: dict[Any, _Segments],
    own: _Segments,
    start: float,
    end: float,
) -> tuple[dict[Part, float], float]:
    """Seconds by part, and those of hidden exchanges, from the kernels, each with the event of its launch."""
    changes: list[tuple[float, int, Part]] = []
    for each, launch in launched:
        component, label = threads.get(launch["tid"], own).at(float(launch["ts"]))
        if component == OUTSIDE:  # launched by a thread of autograd
            component = own.at(float(launch["ts"]))[0]
        if label.kind != EXCHANGE:
            by_name = of_kernel(each["name"])
            if by_name is not None and (label.kind == OTHER or by_name.kind == EXCHANGE):
                label = by_name._replace(strategy=label.strategy)
        began = max(start, float(each["ts"]))
        ended = min(end, float(each["ts"]) + float(each["dur"]))
        if ended > began:
            changes += [(began, 1, (component, label)), (ended, -1, (component, label))]
    seconds: dict[Part, float] = collections.defaultdict(float)
    in_progress: collections.Counter[Part] = collections.Counter()
    hidden, idle_since, time = 0.0, start, start
    for at, change, part in sorted(changes, key=lambda one: one[:2]):
        if in_progress:
            shown = min(in_progress, key=lambda one: _PRIORITY.index(one[1].kind))
            seconds[shown] += (at - time) / 1e6
            if shown[1].kind != EXCHANGE and any(one[1].kind == EXCHANGE for one in in_progress):
                hidden += (at - time) / 1e6
        elif at > idle_since:
            seconds[part[0], Label(IDLE)] += (at - idle_since) / 1e6
        time = at
        in_progress[part] += change
        if not in_progress[part]:
            del in_progress[part]
        idle_since = at
    if end > idle_since:
        seconds[OUTSIDE, Label(IDLE)] += (end - idle_since) / 1e6
    return dict(seconds), hidden
