"""Rules of matrix products. What is split in an output dimension stays split; sums over split rows are added over the
ranks; if both factors are split in different places, one of them is gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .alignment import part_of
from .operators import rule
from .row_split import RowSplit
from .unsplittable import unsplittable

aten = torch.ops.aten


@rule(aten.mm.default, aten.bmm.default)
def _product(func: Any, one: Tensor, other: Tensor) -> Tensor:
    """`[batch, m, k] @ [batch, k, n]`, with or without the batch."""
    one, other = (each.without_halo() if isinstance(each, RowSplit) else each for each in (one, other))
    here, there = _place(one), _place(other)
    if (here == -2 and there is not None and there != -3) or (here == -1 and there == -1):
        # Both are split: `m` and `n` (or `k`), or `k` and `n`.
        if here == -2:
            other, there = other.full(), None  # type: ignore[attr-defined]
        else:
            one, here = one.full(), None  # type: ignore[attr-defined]
    split = one if isinstance(one, RowSplit) else other
    assert isinstance(split, RowSplit)
    if isinstance(one, RowSplit) and isinstance(other, RowSplit):
        if one.rows._replace(dim=0) != other.rows._replace(dim=0) or (here, there) not in ((-3, -3), (-1, -2)):
            raise unsplittable(f"a matrix product of tensors that are split as {one.rows} and {other.rows}")
        a, b = one.local, other.local
    elif isinstance(one, RowSplit):
        a, b = one.local, other
        if here != -2:
            b = part_of(other, -3 if here == -3 else -2, one.rows, one.team)
    else:
        assert isinstance(other, RowSplit)
        a, b = one, other.local
        if there != -1:
            a = part_of(one, -3 if there == -3 else -1, other.rows, other.team)
    out = func(a, b)
    if here == -1 or there == -2:
        return split.team.sum(out)
    return split.like(out)


def _place(tensor: Tensor) -> int | None:
    """The split dimension, counted from the end."""
    return tensor.rows.dim - tensor.ndim if isinstance(tensor, RowSplit) else None


@rule(aten.addmm.default, aten.baddbmm.default)
def _sum_and_product(func: Any, bias: Tensor, one: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(bias, RowSplit) and not isinstance(other, RowSplit) and _place(one) == -2 and bias.ndim == 1:
        assert isinstance(one, RowSplit)  # a linear layer
        one = one.without_halo()
        return one.like(func(bias, one.local, other, beta=beta, alpha=alpha))
    product = _product(aten.mm.default if func is aten.addmm.default else aten.bmm.default, one, other)
    return torch.add(bias if beta == 1 else bias * beta, product, alpha=alpha)
