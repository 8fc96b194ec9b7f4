"""The layout of received rows in a flat tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

OTHERS, EVERYONE = 0, -1
"""Targets of a gather, in place of the shift of a ring: all other ranks, or all ranks including this one."""
_ODD = 61
"""Unused elements at the end of the received tensor; see `GatheredRows`."""
_ALIGN = 128
"""Every part begins at a multiple of this many elements."""


class GatheredRows(NamedTuple):
    """The layout of received rows in a flat tensor. Each tensor of a call is a part, such as keys and values.

    A compiled graph treats the flat tensor as its own and might reuse its memory after the last read. In practice it
    does not: a compiler reuses memory for a tensor of about the same size, and no other tensor has the size of this
    one.
    """

    batch: int
    rows: int
    tails: tuple[tuple[int, ...], ...]
    """Sizes of a row of each part, such as heads and head_dim."""

    @staticmethod
    def of(tensors: Sequence[Tensor], sizes: Sequence[int], rank: int, shift: int = OTHERS) -> GatheredRows:
        """The layout on `rank`, from any rank's `[batch, rows, ...]` tensors and the number of rows of every rank.
        `shift` selects the rows of the rank that is `shift` before, of all other ranks, or of all ranks."""
        rows = sizes[(rank - shift) % len(sizes)] if shift > 0 else sum(sizes)
        rows -= sizes[rank] if shift == OTHERS else 0
        return GatheredRows(tensors[0].shape[0], rows, tuple(tuple(tensor.shape[2:]) for tensor in tensors))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First element of each part, and the element behind its last."""
        found, end = [], 0
        for tail in self.tails:
            start = -(-end // _ALIGN) * _ALIGN
            end = start + self.batch * self.rows * math.prod(tail)
            found.append((start, end))
        return found

    @property
    def length(self) -> int:
        return self.bounds[-1][1] + _ODD

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts, `[batch, rows, ...]`, rows in the order of the ranks."""
        return [
            flat[start:end].view(self.batch, self.rows, *tail) for (start, end), tail in zip(self.bounds, self.tails)
        ]
