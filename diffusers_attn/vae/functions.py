"""Rules of functions of `torch.nn.functional` that look beyond single rows: padding and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .halo import padded
from .operators import rule
from .row_split import FUNCTIONS, RowSplit
from .unsplittable import unsplittable


def _pad(input: RowSplit, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> RowSplit:
    return padded(input, list(pad), mode, value)


def _interpolate(
    input: RowSplit,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> RowSplit:
    """Nearest neighbours, by a whole factor in the split dimension. Other dimensions may change by any factor."""
    split = input.without_halo().populated("an interpolation")
    dims, place = split.ndim - 2, split.rows.dim - 2
    rows, shard = split.rows, split.team.shard
    if place < 0:
        local = F.interpolate(split.local, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
        return split.like(local)
    if size is None:
        assert scale_factor is not None
        factors = [scale_factor] * dims if isinstance(scale_factor, (int, float)) else list(scale_factor)
        factor: float = factors[place]
        sizes = None
    else:
        sizes = [size] * dims if isinstance(size, int) else list(size)
        factor = sizes[place] / rows.total
    if mode not in ("nearest", "nearest-exact") or rows.outer != 1 or factor != int(factor) or factor < 1:
        raise unsplittable(f"interpolation of rows with mode {mode!r} by {factor:g}")
    if sizes is not None:
        sizes[place] = rows.count(shard) * int(factor)
        local = F.interpolate(split.local, sizes, mode=mode)
    else:
        local = F.interpolate(
            split.local, scale_factor=scale_factor, mode=mode, recompute_scale_factor=recompute_scale_factor
        )
    return split.like(local, bounds=rows.scaled(int(factor)).bounds)


@rule(torch.ops.aten.constant_pad_nd.default)
def _constant_pad(func: Any, input: RowSplit, pad: Sequence[int], value: float = 0) -> RowSplit:
    return padded(input, list(pad), "constant", value)


FUNCTIONS[F.pad] = _pad
FUNCTIONS[F.interpolate] = _interpolate
