"""The report of `profile`."""

from __future__ import annotations

import collections
import gzip
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...errors import AttentionProviderError
from .timeline import OUTSIDE, Times, divide

_NAME = "trace.json"


class ProfilePart(NamedTuple):
    """One part of the time. The parts of a report add up to its whole."""

    component: str
    """Name of the pipeline's component, such as "transformer" or "vae.decode"; or "outside of components"."""
    kind: str
    """"attention", "exchange", "other", or "waiting for the host" while a GPU has nothing to do."""
    provider: str
    """Provider of the attention; or the operator or kernel, where only that is visible."""
    strategy: str
    """Strategy of an attention call and of its exchanges, such as "ring 2", or "one rank"; empty for all else."""
    calls: int
    """Number of attention calls or exchanges; for "other", calls of the component. 0 where they were not counted."""
    seconds: float


def as_table(parts: Sequence[ProfilePart], notes: Sequence[str]) -> str:
    """The parts as a table of plain text, and the notes below it."""
    total = sum(each.seconds for each in parts)
    header = ("component", "kind", "provider", "strategy", "calls", "seconds", "share")
    rows = [
        (*each[:4], f"{each.calls or ''}", f"{each.seconds:.4f}", f"{each.seconds / (total or 1.0):.1%}")
        for each in parts
    ]
    rows.append(("all", "", "", "", "", f"{total:.4f}", "100.0%"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column > 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([*lines, *notes])


class ProfileReport:
    """Where the time of a profile went, see `profile`. Prints as a table. Complete when its context has ended."""

    def __init__(self) -> None:
        self._times: Times | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._notes: list[str] = []

    @property
    def parts(self) -> tuple[ProfilePart, ...]:
        """The parts, by component in the order of their first calls, the longest first."""
        times = self._complete()
        order = list(dict.fromkeys(component for component, _ in times.calls))
        found = [
            ProfilePart(component, *label, times.calls.get((component, label), 0), seconds)
            for (component, label), seconds in times.seconds.items()
            if seconds > 0
        ]
        last = len(order)
        places = {component: (component == OUTSIDE, number) for number, component in enumerate(order)}
        return tuple(
            sorted(found, key=lambda each: (places.get(each.component, (True, last)), each.component, -each.seconds))
        )

    @property
    def seconds(self) -> float:
        """Seconds of the whole profile."""
        return self._complete().total

    @property
    def hidden_exchange_seconds(self) -> float:
        """Seconds in which a GPU exchanged data while it computed. They belong to the computation in `parts`."""
        return self._complete().hidden

    def by(self, field: Literal["component", "kind", "provider", "strategy"]) -> dict[str, float]:
        """Seconds by one field of the parts, the longest first; parts in which it is empty are left out, except by
        kind and component."""
        if field not in ("component", "kind", "provider", "strategy"):
            raise AttentionProviderError(f"by({field!r}): accepted are 'component', 'kind', 'provider' and 'strategy'.")
        found: collections.Counter[str] = collections.Counter()
        for each in self.parts:
            if name := getattr(each, field):
                found[name] += each.seconds  # type: ignore[assignment]
        return {name: float(seconds) for name, seconds in found.most_common()}

    def save_trace(self, path: str | Path) -> None:
        """Writes the trace of torch.profiler, for chrome://tracing or https://ui.perfetto.dev.

        Args:
            path: a .json file, or a .json.gz file for a compressed trace.

        Raises:
            AttentionProviderError: the file has another suffix.
        """
        self._complete()
        path = Path(path)
        if not path.name.endswith((".json", ".json.gz")):
            raise AttentionProviderError(f"save_trace was given {path}; a .json or a .json.gz file is accepted.")
        assert self._folder is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(Path(self._folder.name) / _NAME, "rb") as trace:
            with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
                shutil.copyfileobj(trace, file)

    def __str__(self) -> str:
        return "a profile that has not ended" if self._times is None else as_table(self.parts, self.notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what the parts do not show."""
        times = self._complete()
        notes = list(self._notes)
        if times.hidden:
            notes.append(f"Exchanges during computation, which are not in the table: {times.hidden:.4f} s.")
        if times.from_graphs:
            notes.append(
                f"CUDA graphs launched {times.from_graphs:,} kernels. Attention and exchanges among them are "
                "recognised by the names of kernels, and not counted; profile(pipe, cuda_graphs=False) runs without "
                "graphs."
            )
        return tuple(notes)

    def _complete(self) -> Times:
        if self._times is None:
            raise AttentionProviderError("the profile is read when its context has ended: after `with profile(...)`.")
        return self._times

    def _finish(self, profiler: Any, notes: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="diffusers-attn-profile-")
        path = Path(self._folder.name) / _NAME
        profiler.export_chrome_trace(str(path))
        self._times = divide(json.loads(path.read_text(errors="replace"))["traceEvents"])
        self._notes = notes
