"""A process group as this rank sees it."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Plain values, which a compiled graph takes as constants."""

    name: str
    """what PyTorch's functional collectives know it by; of no meaning where size is 1."""
    rank: int
    size: int


ALONE = Group("", 0, 1)
"""The group of a rank that shares nothing."""
