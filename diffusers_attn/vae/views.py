"""Rules of ATen operators that return a view: the rows stay on their ranks, and are found again in the new shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .operators import rule
from .row_split import RowSplit
from .rows import reshaped
from .unsplittable import unsplittable

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
def _view(func: Any, split: RowSplit, shape: Sequence[int], *strides: Any) -> RowSplit:
    split = split.without_halo()
    shape = list(shape)
    if -1 in shape:
        known = 1
        for size in shape:
            known *= 1 if size == -1 else size
        shape[shape.index(-1)] = split.numel() // known
    rows = reshaped(split.rows, split.shape, shape)
    if rows is None:
        raise unsplittable(
            f"a reshape from {tuple(split.shape)} to {tuple(shape)} mixes the rows of ranks, which are split in "
            f"dimension {split.rows.dim} at {split.rows.bounds}"
        )
    own = list(shape)
    own[rows.dim] = rows.outer * rows.count(split.team.shard)
    local = split.local.view(own) if func is aten.view.default else split.local.reshape(own)
    return RowSplit(local, rows, split.team)


@rule(aten.permute.default)
def _permute(func: Any, split: RowSplit, dims: Sequence[int]) -> RowSplit:
    dims = [dim % split.ndim for dim in dims]
    return split.like(split.local.permute(dims), dim=dims.index(split.rows.dim))


@rule(aten.transpose.int)
def _transpose(func: Any, split: RowSplit, one: int, other: int) -> RowSplit:
    one, other = one % split.ndim, other % split.ndim
    dim = {one: other, other: one}.get(split.rows.dim, split.rows.dim)
    return split.like(split.local.transpose(one, other), dim=dim)


@rule(aten.t.default)
def _t(func: Any, split: RowSplit) -> RowSplit:
    return split.like(split.local.t(), dim=split.ndim - 1 - split.rows.dim) if split.ndim == 2 else split


@rule(aten.unsqueeze.default)
def _unsqueeze(func: Any, split: RowSplit, dim: int) -> RowSplit:
    dim %= split.ndim + 1
    return split.like(split.local.unsqueeze(dim), dim=split.rows.dim + (dim <= split.rows.dim))


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(func: Any, split: RowSplit, dims: int | Sequence[int] | None = None) -> RowSplit:
    asked = range(split.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    # A rank may have one row of several, which stays a dimension.
    removed = [dim % split.ndim for dim in asked if split.shape[dim] == 1]
    dim = split.rows.dim - sum(each < split.rows.dim for each in removed)
    return split.like(split.local.squeeze(removed), dim=dim)


@rule(aten.expand.default)
def _expand(func: Any, split: RowSplit, shape: Sequence[int], **kwargs: Any) -> RowSplit:
    dim = split.rows.dim + len(shape) - split.ndim
    own = list(shape)
    own[dim] = -1
    return split.like(split.local.expand(own), dim=dim)


@rule(aten.slice.Tensor)
def _slice(
    func: Any, split: RowSplit, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> RowSplit:
    dim %= split.ndim
    if dim != split.rows.dim:
        return split.like(func(split.local, dim, start, end, step))
    start, end, step = slice(start, end, step).indices(split.shape[dim])
    if (start, end, step) == (0, split.shape[dim], 1):
        return split.like(func(split.local, dim))
    split = split.without_halo()
    rows, shard = split.rows, split.team.shard
    if step != 1 or rows.outer != 1:
        raise unsplittable(f"a slice [{start}:{end}:{step}] of the split dimension")
    bounds = tuple(min(max(bound - start, 0), max(end - start, 0)) for bound in rows.bounds)
    skipped = min(max(start - rows.bounds[shard], 0), rows.count(shard))
    local = split.local.narrow(dim, skipped, bounds[shard + 1] - bounds[shard])
    return split.like(local, bounds=bounds)


@rule(aten.select.int)
def _select(func: Any, split: RowSplit, dim: int, index: int) -> RowSplit:
    dim %= split.ndim
    if dim == split.rows.dim:
        raise unsplittable(f"row {index} is selected")
    return split.like(split.local.select(dim, index), dim=split.rows.dim - (dim < split.rows.dim))


@rule(aten.unbind.int)
def _unbind(func: Any, split: RowSplit, dim: int = 0) -> list[RowSplit]:
    dim %= split.ndim
    return [_select(func, split, dim, index) for index in range(split.shape[dim])]


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, split: RowSplit, sizes: int | Sequence[int], dim: int = 0) -> list[RowSplit]:
    dim %= split.ndim
    if dim != split.rows.dim:
        return [split.like(each) for each in func(split.local, sizes, dim)]
    if isinstance(sizes, int):
        sizes = [min(sizes, split.shape[dim] - start) for start in range(0, split.shape[dim], sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_slice(func, split, dim, start, start + size) for start, size in zip(starts, sizes)]


@rule(aten.unfold.default)
def _unfold(func: Any, split: RowSplit, dim: int, size: int, step: int) -> RowSplit:
    if dim % split.ndim == split.rows.dim:
        raise unsplittable("rows are unfolded")
    return split.like(func(split.local, dim, size, step))
