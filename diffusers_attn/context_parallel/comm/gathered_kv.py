"""The layout of received keys and values in a flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

OTHERS, EVERYONE = 0, -1
"""Targets of a gather, in place of the shift of a ring: all other ranks, or all ranks including this one."""
_ODD = 61
"""Unused elements at the end of the received tensor; see `GatheredKV`."""
_ALIGN = 128
"""The value begins at a multiple of this many elements."""


class GatheredKV(NamedTuple):
    """The layout of received keys and values in a flat tensor.

    A compiled graph treats this tensor as its own and might reuse its memory after the last read. In practice it does
    not: a compiler reuses memory for a tensor of about the same size, and no other tensor has the size of this one.
    """

    batch: int
    rows: int
    key_tail: tuple[int, ...]
    """Heads and head_dim of the key."""
    value_tail: tuple[int, ...]

    @staticmethod
    def of(key: Tensor, value: Tensor, sizes: Sequence[int], rank: int, shift: int = OTHERS) -> GatheredKV:
        """The layout on `rank`, from any rank's `[batch, rows, heads, head_dim]` and the number of rows of every rank.
        `shift` selects the rows of the rank that is `shift` before, of all other ranks, or of all ranks."""
        rows = sizes[(rank - shift) % len(sizes)] if shift > 0 else sum(sizes)
        rows -= sizes[rank] if shift == OTHERS else 0
        return GatheredKV(key.shape[0], rows, tuple(key.shape[2:]), tuple(value.shape[2:]))

    @property
    def key_elements(self) -> int:
        return self.batch * self.rows * self.key_tail[0] * self.key_tail[1]

    @property
    def value_elements(self) -> int:
        return self.batch * self.rows * self.value_tail[0] * self.value_tail[1]

    @property
    def value_start(self) -> int:
        return -(-self.key_elements // _ALIGN) * _ALIGN

    @property
    def length(self) -> int:
        return self.value_start + self.value_elements + _ODD

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value, `[batch, rows, heads, head_dim]`, rows in the order of the ranks."""
        key = flat[: self.key_elements].view(self.batch, self.rows, *self.key_tail)
        value = flat[self.value_start : self.value_start + self.value_elements]
        return key, value.view(self.batch, self.rows, *self.value_tail)
