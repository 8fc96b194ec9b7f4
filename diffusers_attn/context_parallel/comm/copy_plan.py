"""The copies by which a rank sends its rows to other ranks, planned once per kind of call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gathered_rows import EVERYONE, GatheredRows
from .group import Group


class Copy(NamedTuple):
    """One copy of this rank's rows to one rank."""

    part: int
    """Index of the tensor to copy from, among those of the call."""
    sample: int | None
    """Index of the sample to copy; None copies the full batch, if it is contiguous in the target."""
    target: Tensor

    def make(self, tensors: Sequence[Tensor]) -> None:
        """Copies from this rank's `tensors` on the current stream."""
        source = tensors[self.part]
        self.target.copy_(source if self.sample is None else source[self.sample : self.sample + 1])


class CopyPlan(NamedTuple):
    """For each slot, the copies to other ranks and to this rank, and the received tensor, for one kind of call."""

    to_others: list[list[Copy]]
    to_itself: list[list[Copy]]
    received: list[Tensor]


def make_copy_plan(
    buffers: Sequence[Tensor],
    slot_bytes: int,
    slots: int,
    layouts: Sequence[GatheredRows],
    dtype: torch.dtype,
    sizes: Sequence[int],
    shift: int,
    group: Group,
) -> CopyPlan:
    """The copies of calls with these shapes.

    Args:
        buffers: memory of each rank as bytes, mapped into this process.
        slot_bytes: distance of slots in bytes.
        slots: number of slots that such calls use in turn.
        layouts: layout of the received data on each rank.
        dtype: dtype of the rows.
        sizes: number of rows of every rank.
        shift: in a ring, the distance to the receiving rank; or OTHERS, or EVERYONE.
    """
    # Each rank begins with the next rank, so that no rank is the first target of all.
    steps = [shift] if shift > 0 else range(1, group.size)
    others = [(group.rank + step) % group.size for step in steps]
    itself = [group.rank] if shift == EVERYONE else []
    with torch.inference_mode(False):
        places = [
            [
                buffer[slot * slot_bytes :][: layout.length * dtype.itemsize].view(dtype)
                for buffer, layout in zip(buffers, layouts)
            ]
            for slot in range(slots)
        ]
        to_others, to_itself = (
            [
                [copy for rank in ranks for copy in _copies(place[rank], layouts[rank], sizes, rank, shift, group.rank)]
                for place in places
            ]
            for ranks in (others, itself)
        )
    return CopyPlan(to_others, to_itself, [place[group.rank] for place in places])


def _copies(
    flat: Tensor, layout: GatheredRows, sizes: Sequence[int], receiver: int, shift: int, sender: int
) -> list[Copy]:
    """The rows of rank `sender` at rank `receiver`, in pieces that are contiguous there."""
    rows = sizes[sender]
    if rows == 0:
        return []
    ranks_before = [] if shift > 0 else [other for other in range(sender) if shift == EVERYONE or other != receiver]
    start = sum(sizes[other] for other in ranks_before)
    found = []
    for part, there in enumerate(layout.views(flat)):
        target = there.narrow(1, start, rows)
        contiguous = layout.batch == 1 or rows == layout.rows
        pieces = [(None, target)] if contiguous else [(n, target[n : n + 1]) for n in range(layout.batch)]
        found += [Copy(part, sample, piece) for sample, piece in pieces]
    return found
