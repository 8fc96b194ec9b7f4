"""Draws measured speeds as bars, with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ...atomic_files import write_atomically
from ...errors import AttentionProviderError
from .measure import Result

FORMATS = (".png", ".svg", ".pdf")


def check_plottable(path: Path) -> None:
    """Raises AttentionProviderError without matplotlib, and for a file of another format."""
    if path.suffix not in FORMATS:
        raise AttentionProviderError(f"--plot {path}: accepted are files that end in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise AttentionProviderError("--plot needs matplotlib: `pip install matplotlib`.")


def draw(path: Path, measured: Sequence[tuple[str, Sequence[Result]]], title: str, matmul_tflops: float) -> None:
    """Draws one group of bars for each shape, and a line for the speed of matrix products.

    Args:
        path: file to write.
        measured: (name of the shape, results).
        title: title of the picture.
        matmul_tflops: speed of matrix products in TFLOP/s.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(each.provider for _, results in measured for each in results if each.tflops is not None))
    bars = len(names) * len(measured)
    figure = Figure(figsize=(max(6.0, 2.0 + 0.35 * bars), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        heights = [
            next((each.tflops or 0.0 for each in results if each.provider == name), 0.0) for _, results in measured
        ]
        places = [shape - 0.4 + (i + 0.5) * width for shape in range(len(measured))]
        lossy = any(each.provider == name and not each.exact for _, results in measured for each in results)
        # matplotlib leaves labels that begin with an underscore out of the legend.
        label = f" {name} (lossy)" if lossy else f" {name}"
        axes.bar(places, heights, width, label=label, hatch="//" if lossy else None)
    axes.axhline(matmul_tflops, color="gray", linestyle="--", linewidth=1, label=" matrix products")
    axes.set_xticks(range(len(measured)), [name for name, _ in measured])
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title, fontsize="medium", wrap=True)
    figure.legend(loc="outside right upper", fontsize="small")
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=150))
