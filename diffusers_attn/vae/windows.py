"""Operations that slide a window over the rows, such as convolutions. Each shard computes the output rows whose middle
it holds, after a halo of the rows that their windows cover."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from torch import Tensor

from .halo import padded
from .row_split import RowSplit
from .rows import Rows
from .unsplittable import unsplittable


def slide(split: RowSplit, size: int, step: int, padding: int, compute: Callable[[Tensor], Tensor]) -> RowSplit:
    """Applies an operation with a window of `size` rows, which moves by `step` rows.

    Args:
        split: the input.
        size: rows from the first to the last of a window.
        step: rows from one window to the next.
        padding: rows of zeros above and below the image.
        compute: the operation on a local tensor, without padding of rows.
    """
    if split.rows.outer != 1:
        raise unsplittable(f"a window of {size} rows slides over a tensor that is split as {split.rows}")
    bounds = same_places(split.rows, size, step) if padding == 0 else None
    if bounds is not None:
        return split.like(compute(split.local), bounds=bounds, halo=(0, 0))
    split = split.without_halo().populated("a convolution or pool")
    rows, shard = split.rows, split.team.shard
    total = (rows.total + 2 * padding - size) // step + 1
    middle = (size - 1) // 2 - padding
    cut = (-(-(bound - middle) // step) for bound in rows.bounds[1:-1])
    bounds = (0, *(min(max(row, 0), total) for row in cut), total)
    if any(start >= end for start, end in itertools.pairwise(bounds)):
        raise unsplittable(f"a window of {size} rows leaves one of {rows.shards} ranks without a row")
    # The first row that a shard's windows cover, and the row after the last one.
    first = [row * step - padding for row in bounds[:-1]]
    end = [(row - 1) * step - padding + size for row in bounds[1:]]
    above = max(0, *(bound - row for bound, row in zip(rows.bounds, first)))
    below = max(0, *(row - bound for bound, row in zip(rows.bounds[1:], end)))
    beside = [0] * 2 * (split.local.ndim - 1 - rows.dim)
    local = padded(split, [*beside, above, below]).local if above or below else split.local
    local = local.narrow(rows.dim, first[shard] - rows.bounds[shard] + above, end[shard] - first[shard])
    return split.like(compute(local), bounds=bounds)


@functools.lru_cache(maxsize=4096)
def same_places(rows: Rows, size: int, step: int) -> tuple[int, ...] | None:
    """Bounds of the output if every shard's rows with their halo are just what its output rows need, else None."""
    spare, inner = sum(rows.halo) - size + step, rows.bounds[1:-1]
    if min(rows.counts()) == 0:
        return None
    if not 0 <= spare < step or any(bound % step for bound in inner):
        return None
    total = (rows.total + sum(rows.halo) - size) // step + 1
    return (0, *(bound // step for bound in inner), total) if inner[-1] // step < total else None
