"""Padding of split tensors: rows beyond a shard's own come from the neighbours, and from padding at the image's edges.

One gather of the edge rows of all ranks serves both directions. It runs while the local part is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .row_split import RowSplit
from .unsplittable import unsplittable


def padded(split: RowSplit, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> RowSplit:
    """`F.pad` of a split tensor. If it pads rows, the result has a halo; see `Rows.halo`.

    Args:
        split: the tensor.
        pad: elements to add, from the last dimension: `(left, right, above, below, ...)`.
        mode, value: as for `F.pad`.
    """
    place = 2 * (split.ndim - 1 - split.rows.dim)
    above, below = (*pad, *[0] * split.ndim * 2)[place : place + 2]
    if above == below == 0:
        return split.like(F.pad(split.local, pad, mode, value))
    split = split.without_halo()
    rows, team, dim = split.rows, split.team, split.rows.dim
    if above < 0 or below < 0 or rows.outer != 1:
        raise unsplittable(f"padding of dimension {dim} by {above} and {below}")
    count, shard, last = rows.count(team.shard), team.shard, rows.shards - 1
    if min(rows.counts()) <= max(above, below):  # a halo may reach beyond the neighbour
        image = F.pad(split.full(), pad, mode, value)
        local = image.narrow(dim, rows.bounds[shard], count + above + below).contiguous()
        return split.like(local, halo=(above, below))
    # The last rows of a shard are above the next one's, its first rows are below the previous one's.
    own = split.local
    edges = own.new_empty((above + below, *own.shape[:dim], *own.shape[dim + 1 :]))
    edges[:above] = own.narrow(dim, count - above, above).movedim(dim, 0)
    edges[above:] = own.narrow(dim, 0, below).movedim(dim, 0)
    gathering = team.start_gather(edges)
    local = F.pad(own, pad, mode, value)
    gathered = gathering.wait()
    beside = list(pad)
    beside[place : place + 2] = (0, 0)

    def fill(start: int, received: Tensor) -> None:
        received = received.movedim(0, dim)
        if any(beside):
            received = F.pad(received, beside, mode, value)
        local.narrow(dim, start, received.shape[dim]).copy_(received)

    circular = mode == "circular"
    if above and (shard > 0 or circular):
        fill(0, gathered[shard - 1 if shard > 0 else last][:above])
    if below and (shard < last or circular):
        fill(above + count, gathered[shard + 1 if shard < last else 0][above:])
    return split.like(local, halo=(above, below))
