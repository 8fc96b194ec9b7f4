"""Draws the losses in a metrics file, with matplotlib."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..data.disk import write_file

SPAN = 50
"""Number of parts of a run over which the drawn average goes: one fiftieth of its log entries."""


def draw_losses(metrics: Path, picture: Path) -> Path:
    """Draws the loss of each logged step, its moving average, and the evaluation losses.

    Args:
        metrics: a file of log entries, one JSON object with "step" and numbers per line.
        picture: PNG file to write.

    Returns:
        The picture.
    """
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, losses = _values(entries, "loss")
    evaluated = _values(entries, "evaluation/loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of a step")
    span = max(1, len(losses) // SPAN)
    if span > 1:
        axes.plot(steps, moving_average(losses, span), label=f"mean of the last {span}")
    if evaluated[0]:
        axes.plot(*evaluated, "o-", markersize=3, label="evaluation loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_file(picture, lambda path: figure.savefig(path, format="png", dpi=120), "the plot of losses")
    return picture


def moving_average(values: Sequence[float], span: int) -> list[float]:
    """The mean of each value and of up to `span - 1` before it."""
    return [sum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span) for i in range(len(values))]


def _values(entries: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have `name`."""
    found = [(each["step"], each[name]) for each in entries if name in each]
    return [step for step, _ in found], [value for _, value in found]
