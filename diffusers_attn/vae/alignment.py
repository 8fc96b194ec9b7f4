"""Operands of one operation as local tensors that fit together: split alike, or replicated. Dimensions are counted from
the last one, as broadcasting does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .row_split import RowSplit
from .rows import Rows
from .team import Team
from .unsplittable import unsplittable


def aligned(func: Any, tensors: Sequence[Tensor]) -> tuple[RowSplit, list[Tensor]]:
    """Operands that broadcast against each other, as local tensors.

    Args:
        func: the operation, for errors.
        tensors: operands, at least one of which is split.

    Returns:
        A split operand, and all operands as local tensors.

    Raises:
        AttentionProviderError: the operands are split differently.
    """
    splits = [each for each in tensors if isinstance(each, RowSplit)]
    first = splits[0]
    if len(splits) == len(tensors) and all(
        each.rows == first.rows and each.local.ndim == first.local.ndim for each in splits
    ):
        return first, [each.local for each in splits]
    place = first.rows.dim - first.local.ndim
    if len(splits) == 1 and all(
        each is first or (each.ndim <= first.ndim and (each.ndim < -place or each.shape[place] == 1))
        for each in tensors
    ):
        return first, [each.local if each is first else each for each in tensors]  # the usual case, without a detour
    tensors = same_halo(tensors, place)
    first = max((each for each in tensors if isinstance(each, RowSplit)), key=lambda each: each.local.ndim)
    return first, [local_part(func, each, place, first) for each in tensors]


def same_halo(tensors: Sequence[Tensor], place: int) -> list[Tensor]:
    """The operands without halos, if these differ or if a replicated operand has the rows.

    Args:
        place: the split dimension, counted from the end: negative.
    """
    halos = {each.rows.halo for each in tensors if isinstance(each, RowSplit)}
    if halos == {(0, 0)}:
        return list(tensors)
    replicated = [each for each in tensors if not isinstance(each, RowSplit)]
    if len(halos) == 1 and all(each.ndim < -place or each.shape[place] == 1 for each in replicated):
        return list(tensors)
    return [each.without_halo() if isinstance(each, RowSplit) else each for each in tensors]


def local_part(func: Any, tensor: Tensor, place: int, first: RowSplit) -> Tensor:
    """This rank's part of an operand, which must be split as `first` is, or replicated."""
    if not isinstance(tensor, RowSplit):
        return part_of(tensor, place, first.rows, first.team)
    rows, wanted = tensor.rows, first.rows
    if rows._replace(dim=0) != wanted._replace(dim=0) or rows.dim - tensor.local.ndim != place:
        raise unsplittable(f"{func} combines tensors that are split differently, {rows} and {wanted}")
    return tensor.local


def part_of(tensor: Tensor, dim: int, rows: Rows, team: Team) -> Tensor:
    """The part of a replicated tensor that meets this rank's rows.

    Args:
        tensor: may have size 1 in the split dimension, or not have the dimension.
        dim: the split dimension, counted from the end: negative.
    """
    if tensor.ndim < -dim or tensor.shape[dim] == 1:
        return tensor
    if tensor.shape[dim] != rows.size or any(rows.halo):
        raise unsplittable(f"a tensor of shape {tuple(tensor.shape)} meets one with {rows.size} rows")
    start, count = rows.bounds[team.shard], rows.count(team.shard)
    if rows.outer == 1:
        return tensor.narrow(dim, start, count)
    dim += tensor.ndim
    return tensor.unflatten(dim, (rows.outer, rows.total)).narrow(dim + 1, start, count).flatten(dim, dim + 1)
