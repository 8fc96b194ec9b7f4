"""Where the time of a pipeline's call goes: text encoders, transformer, VAE, and the rest."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .components import components_of, watched


class ComponentTimes:
    """The seconds of each component, see `component_times`. Prints as a table."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._ended: Any = None
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._running = 0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each component that ran, in the order of their first calls, and of everything else ("other").
        Waits for the device."""
        found = {name: sum(self._between(*span) for span in spans) for name, spans in self._spans.items()}
        ended = self._now() if self._ended is None else self._ended
        return {**found, "other": max(0.0, self._between(self._began, ended) - sum(found.values()))}

    @property
    def calls(self) -> dict[str, int]:
        """Number of calls of each component."""
        return {name: len(spans) for name, spans in self._spans.items()}

    def __str__(self) -> str:
        seconds, calls = self.seconds, self.calls
        total = sum(seconds.values()) or 1.0
        lines = [f"{'component':20}{'calls':>6}{'seconds':>10}{'share':>8}"]
        for name, each in seconds.items():
            lines.append(f"{name:20}{calls.get(name, ''):>6}{each:>10.3f}{each / total:>8.1%}")
        return "\n".join(lines)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, began: Any, ended: Any) -> float:
        if self._device.type != "cuda":
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # within another component, whose time it is
                return call(*args, **kwargs)
            self._running += 1
            began = self._now()
            try:
                return call(*args, **kwargs)
            finally:
                self._running -= 1
                self._spans.setdefault(name, []).append((began, self._now()))

        return timed


@contextlib.contextmanager
def component_times(pipeline: Any) -> Iterator[ComponentTimes]:
    """Measures the components of a pipeline while they run within this context.

    On GPUs, times are taken by events on the device, and nothing waits for it until the result is read. With several
    ranks, times are those of this rank, and contain its waiting for others. CUDA graphs are replayed as
    before.

    Args:
        pipeline: a diffusers pipeline on its device.

    Raises:
        AttentionProviderError: `pipeline` is no pipeline, or a component is compiled as a whole.
    """
    models = components_of(pipeline, "component_times")
    times = ComponentTimes(torch.device(getattr(pipeline, "_execution_device", "cpu")))
    with watched(models, times._timed):
        yield times
        times._ended = times._now()
