"""Rules of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operators import argument, rule
from .row_split import RowSplit
from .unsplittable import unsplittable
from .windows import slide

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

    def convolve(local: Tensor, padding: Sequence[int] = padding) -> Tensor:
        return func(local, weight, bias, stride, padding, dilation, transposed, output_padding, groups)

    place = split.rows.dim - 2
    if place == -2:  # rows in the batch, as in a convolution over time
        return split.like(convolve(split.local))
    if place == -1:
        raise unsplittable("a convolution of split channels")
    size = (weight.shape[split.rows.dim] - 1) * dilation[place] + 1
    if transposed:
        if size != stride[place] or padding[place] or output_padding[place] or split.rows.outer != 1:
            raise unsplittable(f"a transposed convolution with kernel {size} and stride {stride[place]}")
        split = split.without_halo()
        return split.like(convolve(split.local), bounds=split.rows.scaled(size).bounds)
    beside = [0 if index == place else each for index, each in enumerate(padding)]
    return slide(split, size, stride[place], padding[place], lambda local: convolve(local, beside))


@rule(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _pool(func: Any, split: RowSplit, kernel: Sequence[int], *args: Any, **kwargs: Any) -> RowSplit:
    place = split.rows.dim - (split.ndim - (3 if func is aten.avg_pool3d.default else 2))
    if place < 0:  # rows in the batch, as in a pool over time
        return split.like(func(split.local, kernel, *args, **kwargs))

    def of_rows(values: Sequence[int]) -> int:
        return values[place] if len(values) > 1 else values[0]

    stride = argument(func, (split, kernel, *args), kwargs, "stride", []) or kernel
    padding = argument(func, (split, kernel, *args), kwargs, "padding", [0])
    ceil = argument(func, (split, kernel, *args), kwargs, "ceil_mode", False)
    if of_rows(padding) or ceil:
        raise unsplittable(f"{func} with padding {padding} and ceil_mode={ceil}")
    return slide(split, of_rows(kernel), of_rows(stride), 0, lambda local: func(local, kernel, *args, **kwargs))
