"""Padding of split tensors: rows beyond a shard's own come from the neighbours, and from padding at the image's edges.

One gather of the edge rows of all ranks serves both directions. It runs while the local part is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    own, rows = split.local, split.rows
    place = 2 * (own.ndim - 1 - rows.dim)
    above, below = pad[place : place + 2] if len(pad) > place else (0, 0)
    if above == below == 0:
        return split.like(F.pad(own, pad, mode, value))
    split = split.without_halo()
    own, rows, team, dim = split.local, split.rows, split.team, split.rows.dim
    if above < 0 or below < 0 or rows.outer != 1:
        raise unsplittable(f"padding of dimension {dim} by {above} and {below}")
    shard, last = team.shard, rows.shards - 1
    count = rows.count(shard)
    if min(rows.counts()) <= max(above, below):  # a halo may reach beyond the neighbour
        image = F.pad(split.full(), pad, mode, value)
        local = image.narrow(dim, rows.bounds[shard], count + above + below).contiguous()
        return split.like(local, halo=(above, below))
    beside = list(pad)
    beside[place : place + 2] = (0, 0)
    # The last rows of a shard are above the next one's, its first rows are below the previous one's.
    edges = torch.cat((own.narrow(dim, count - above, above), own.narrow(dim, 0, below)), dim)
    # A constant beside the received rows is there already, where `local` is padded.
    fills_edges = any(beside) and (mode != "constant" or min(beside) < 0)
    if fills_edges:
        edges = F.pad(edges, beside, mode, value)
    gathering = team.start_gather(edges)
    local = F.pad(own, pad, mode, value)
    gathered = gathering.wait()
    target = local if fills_edges else _without_padding(local, own, beside)
    circular = mode == "circular"
    if above and (shard > 0 or circular):
        received = gathered[shard - 1 if shard > 0 else last].narrow(dim, 0, above)
        target.narrow(dim, 0, above).copy_(received)
    if below and (shard < last or circular):
        received = gathered[shard + 1 if shard < last else 0].narrow(dim, above, below)
        target.narrow(dim, above + count, below).copy_(received)
    return split.like(local, halo=(above, below))


def _without_padding(local: Tensor, own: Tensor, beside: Sequence[int]) -> Tensor:
    """The view of a padded tensor without the elements that `beside` has added to `own`."""
    for number in range(0, len(beside), 2):
        if beside[number] or beside[number + 1]:
            dim = own.ndim - 1 - number // 2
            local = local.narrow(dim, beside[number], own.shape[dim])
    return local
