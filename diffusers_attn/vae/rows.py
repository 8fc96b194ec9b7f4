"""Which part of a tensor a shard holds (`Rows`), and where this part is after a reshape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """The split dimension of a tensor, and the part of it that each shard holds.

    The dimension is either rows, or rows flattened with their neighbours, such as `frames * height * width`. Its index
    is `(outer * total + row)`: shard `i` holds the rows from `bounds[i]` to `bounds[i + 1]` of every `outer`. A
    dimension within the rows, such as the width, counts as more rows.
    """

    dim: int
    """Index of the split dimension."""
    bounds: tuple[int, ...]
    """First row of each shard, and the number of rows."""
    outer: int = 1
    """Number of repetitions of the rows in the dimension."""
    halo: tuple[int, int] = (0, 0)
    """Rows that padding has added above and below. Every shard holds that many rows of its neighbours, or of the
    padding at the edges of the image. `bounds` count rows without padding."""

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.bounds[-1]

    @property
    def size(self) -> int:
        """Size of the dimension in the full tensor."""
        return self.outer * self.total + sum(self.halo)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.bounds) - 1

    def count(self, shard: int) -> int:
        """Number of rows of a shard, without its halo."""
        return self.bounds[shard + 1] - self.bounds[shard]

    def counts(self) -> list[int]:
        """Number of rows of every shard, without halos."""
        return [self.count(shard) for shard in range(self.shards)]

    def but(
        self,
        dim: int | None = None,
        bounds: tuple[int, ...] | None = None,
        outer: int | None = None,
        halo: tuple[int, int] | None = None,
    ) -> Rows:
        """The same with other fields. `_replace` takes five times as long."""
        return Rows(
            self.dim if dim is None else dim,
            self.bounds if bounds is None else bounds,
            self.outer if outer is None else outer,
            self.halo if halo is None else halo,
        )

    def scaled(self, factor: int) -> Rows:
        """The same split after each row became `factor` rows."""
        return self if factor == 1 else self._replace(bounds=tuple(bound * factor for bound in self.bounds))

    def divided(self, factor: int) -> Rows | None:
        """The same split after each `factor` rows became one; None if a shard has a part of such a group."""
        if factor == 1:
            return self
        if any(bound % factor for bound in self.bounds):
            return None
        return self._replace(bounds=tuple(bound // factor for bound in self.bounds))


def reshaped(rows: Rows, before: Sequence[int], after: Sequence[int]) -> Rows | None:
    """The split of a tensor after a view.

    Args:
        rows: the split before it, without halo.
        before: shape of the full tensor before the view.
        after: its shape after the view, without -1.

    Returns:
        The split after it; None if the rows of a shard are not a part of one dimension there.
    """
    # Elements of one row are `stride` apart. So the rows of a tensor take the places from `stride` to `stride * total`
    # in the mixed radix of its shape, and the dimension that has the last of these places is the one that is split.
    stride = math.prod(before[rows.dim + 1 :])
    top = stride * rows.total
    inner = 1
    for dim in range(len(after) - 1, -1, -1):
        if inner < top <= inner * after[dim]:
            break
        inner *= after[dim]
    else:
        return None
    if after[dim] * inner % top:
        return None
    outer = after[dim] * inner // top
    if inner <= stride:  # the rows stay in one dimension
        if stride % inner:
            return None
        return Rows(dim, rows.scaled(stride // inner).bounds, outer)
    if inner % stride:
        return None
    divided = rows.divided(inner // stride)  # the dimensions below have a part of each row number
    return None if divided is None else Rows(dim, divided.bounds, outer)


def spread(total: int, shards: int, unit: int = 1) -> tuple[int, ...]:
    """Bounds of `total` rows that are shared out evenly, in multiples of `unit`; the last shard has the remainder."""
    units = total // unit
    return (*(shard * units // shards * unit for shard in range(shards)), total)
