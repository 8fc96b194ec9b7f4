"""Draws groups of horizontal bars as SVG. The same values always give the same text, so that a check can compare it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, ROW, HEAD = 760, 190, 22, 34
"""Pixels: width of the drawing and of its labels, height of a bar and of a group's title."""
COLORS = {True: "#2f6fdb", False: "#9aa7b8"}
"""Of a highlighted bar, and of the others. They are legible on white and on black."""
TEXT = 'font-family="sans-serif" font-size="13" fill="#6b7684"'


class Bar(NamedTuple):
    """A value with its range."""

    label: str
    value: float
    low: float
    high: float


def bars(groups: Mapping[str, Sequence[Bar]], unit: str, highlighted: str) -> str:
    """The drawing. Each group has a scale of its own; bars whose label begins with `highlighted` have another color."""
    shapes, top = [], 0
    for title, group in groups.items():
        room = WIDTH - LABELS - 60
        scale = 0.9 * room / max((bar.value for bar in group), default=1.0)
        shapes.append(f'<text x="4" y="{top + 22}" {TEXT} font-weight="bold">{escape(title)}, {escape(unit)}</text>')
        top += HEAD
        for bar in group:
            middle, end = top + ROW // 2, LABELS + bar.value * scale
            low, high = LABELS + bar.low * scale, LABELS + min(bar.high * scale, room)  # an outlier is cut off
            color = COLORS[bar.label.startswith(highlighted)]
            shapes += [
                f'<text x="{LABELS - 8}" y="{middle + 4}" {TEXT} text-anchor="end">{escape(bar.label)}</text>',
                f'<rect x="{LABELS}" y="{top + 3}" width="{end - LABELS:.1f}" height="{ROW - 6}" fill="{color}"/>',
                f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#222" stroke-width="2"/>',
                f'<text x="{max(end, high) + 6:.1f}" y="{middle + 4}" {TEXT}>{bar.value:.1f}</text>',
            ]
            top += ROW
    size = f'width="{WIDTH}" height="{top + 8}" viewBox="0 0 {WIDTH} {top + 8}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shapes, "</svg>"]) + "\n"
