"""The rule of convolutions. Each shard computes the output rows whose middle it holds, after a halo of the rows that
the kernel covers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .halo import padded
from .operators import rule
from .row_split import RowSplit
from .rows import Rows
from .unsplittable import unsplittable

aten = torch.ops.aten


@rule(aten.convolution.default)
def _convolution(
    func: Any,
    split: RowSplit,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> RowSplit:
    if not isinstance(split, RowSplit) or isinstance(weight, RowSplit):
        raise unsplittable("a convolution with split weights")

    def convolve(local: Tensor, padding: Sequence[int]) -> Tensor:
        return func(local, weight, bias, stride, padding, dilation, transposed, output_padding, groups)

    if split.rows.dim == 0:  # rows in the batch, as in a convolution over time
        return split.like(convolve(split.local, padding))
    place = split.rows.dim - 2
    if place < 0 or split.rows.outer != 1:
        raise unsplittable(f"a convolution of a tensor that is split in dimension {split.rows.dim}")
    step, pad = stride[place], padding[place]
    size = (weight.shape[split.rows.dim] - 1) * dilation[place] + 1
    if transposed:
        if size != step or pad or output_padding[place]:
            raise unsplittable(f"a transposed convolution with kernel {size}, stride {step} and padding {pad}")
        split = split.without_halo()
        return split.like(convolve(split.local, padding), bounds=split.rows.scaled(step).bounds)
    bounds = _same_places(split.rows, size, step) if pad == 0 else None
    if bounds is not None:
        return split.like(convolve(split.local, padding), bounds=bounds, halo=(0, 0))
    split = split.without_halo()
    rows, shard = split.rows, split.team.shard
    total = (rows.total + 2 * pad - size) // step + 1
    middle = (size - 1) // 2 - pad
    cut = (-(-(bound - middle) // step) for bound in rows.bounds[1:-1])
    bounds = (0, *(min(max(row, 0), total) for row in cut), total)
    if any(start >= end for start, end in itertools.pairwise(bounds)):
        raise unsplittable(f"a convolution to {total} rows leaves no row for one of {rows.shards} ranks")
    # The first row that a shard's kernels cover, and the row after the last one.
    first = [row * step - pad for row in bounds[:-1]]
    end = [(row - 1) * step - pad + size for row in bounds[1:]]
    above = max(0, *(bound - row for bound, row in zip(rows.bounds, first)))
    below = max(0, *(row - bound for bound, row in zip(rows.bounds[1:], end)))
    beside = [0] * 2 * (split.ndim - 1 - rows.dim)
    local = padded(split, [*beside, above, below]).local if above or below else split.local
    local = local.narrow(rows.dim, first[shard] - rows.bounds[shard] + above, end[shard] - first[shard])
    padding = [0 if index == place else each for index, each in enumerate(padding)]
    return split.like(convolve(local, padding), bounds=bounds)


def _same_places(rows: Rows, size: int, step: int) -> tuple[int, ...] | None:
    """Bounds of the output if every shard's rows with their halo are just what its output rows need, else None."""
    spare = sum(rows.halo) - size + step
    inner = rows.bounds[1:-1]
    if not 0 <= spare < step or any(bound % step for bound in inner):
        return None
    return (0, *(bound // step for bound in inner), (rows.total + sum(rows.halo) - size) // step + 1)
