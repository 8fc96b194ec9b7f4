"""Two images side by side, with their difference enlarged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 384
"""Pixels to which smaller images are enlarged."""


def factor_of(difference: float) -> int:
    """The factor by which differences up to this one are enlarged: the largest power of two that keeps them below 1."""
    return 1 if difference <= 0 else 2 ** max(0, math.floor(-math.log2(difference)))


def sheet(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], names: tuple[str, str], title: str) -> Image.Image:
    """One row for each pair of images: both of them, and their absolute difference times a factor.

    Args:
        rows: a text for each pair, and the images `[height, width, 3]` in [0, 1], all of one size.
        names: names of the two columns.
        title: text above all.
    """
    factor = factor_of(max(float(np.abs(one - other).max()) for _, one, other in rows))
    height, width = rows[0][1].shape[:2]
    scale = max(1, math.ceil(_SMALLEST / max(height, width)))
    height, width = height * scale, width * scale
    line = max(28, width // 16)
    below = height + 5 * line // 4
    """Pixels from one row to the next."""
    drawn = Image.new("RGB", (3 * (width + line) + line, 3 * line // 2 + len(rows) * below), "white")
    text = ImageDraw.Draw(drawn)

    def write(words: str, left: int, middle: float, size: float, most: int, colour: str) -> None:
        font = ImageFont.load_default(size)
        while text.textlength(words, font) > most and size > 8:
            size -= 1
            font = ImageFont.load_default(size)
        text.text((left, middle), words, fill=colour, font=font, anchor="lm")

    write(title, line, line * 0.75, line * 0.6, drawn.width - 2 * line, "black")
    for row, (label, one, other) in enumerate(rows):
        top = 2 * line + row * below
        heads = (*names, f"difference x {factor}")
        for column, (head, image) in enumerate(zip(heads, (one, other, np.abs(one - other) * factor))):
            left = line + column * (width + line)
            words = f"{label}: {head}" if label and column == 0 else head
            write(words, left, top - line * 0.4, line * 0.5, width, "#444444")
            tile = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
            drawn.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return drawn
