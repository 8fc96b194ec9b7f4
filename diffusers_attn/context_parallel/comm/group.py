"""A process group as this rank sees it."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Plain values, which a compiled graph treats as constants."""

    name: str
    """Name of the group for PyTorch's functional collectives; unused if size is 1."""
    rank: int
    size: int


ALONE = Group("", 0, 1)
"""A group of one rank."""
