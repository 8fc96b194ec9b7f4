"""Rules of PyTorch's functions that a VAE calls most, without a detour.

Each is right without this file: the functions then reach the rules of ATen operators through PyTorch's dispatcher, one
operator after the other. That takes two to five times as long on the host, which matters from four GPUs on, where a
frame of Wan has 20 ms of work for each of them and 500 operations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import cat, pointwise
from .row_split import FUNCTIONS, RowSplit
from .windows import same_places


def _otherwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The result by the rules of operators."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _normalize(input: RowSplit, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    if isinstance(input, RowSplit) and isinstance(dim, int) and out is None and dim % input.ndim != input.rows.dim:
        return input.like(F.normalize(input.local, p, dim, eps))
    return _otherwise(F.normalize, input, p, dim, eps, out)


def _dropout(input: RowSplit, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return _otherwise(F.dropout, input, p, training, inplace) if training else input


def _cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Any:
    return _otherwise(torch.cat, tensors, dim, **options) if options else cat(torch.cat, tensors, dim)


def _getitem(split: RowSplit, index: Any) -> Any:
    """Slices of dimensions that are not split."""
    if type(index) is tuple and all(type(each) is slice for each in index):
        dim = split.rows.dim
        if len(index) <= dim or index[dim] == slice(None):
            return split.like(split.local[index])
    return _otherwise(torch.Tensor.__getitem__, split, index)


def _convolution(func: Any, input: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A convolution of rows that need no exchange: after padding, or of single rows."""
    if isinstance(input, RowSplit) and len(args) == 5 and not isinstance(weight, RowSplit):
        _, stride, padding, dilation, _ = args
        rows = input.rows
        place = rows.dim - 2
        if type(stride) is type(padding) is type(dilation) is tuple and place >= 0 and rows.outer == 1:
            size = (weight.shape[rows.dim] - 1) * dilation[place] + 1
            bounds = same_places(rows, size, stride[place]) if padding[place] == 0 else None
            if bounds is not None:
                return input.like(func(input.local, weight, *args), bounds=bounds, halo=(0, 0))
    return _otherwise(func, input, weight, *args, **kwargs)


FUNCTIONS |= {
    F.normalize: _normalize,
    F.dropout: _dropout,
    torch.cat: _cat,
    torch.Tensor.__getitem__: _getitem,
    **{func: functools.partial(_convolution, func) for func in (F.conv2d, F.conv3d)},
    **{
        func: functools.partial(pointwise, func)
        for func in (torch.Tensor.add, torch.Tensor.mul, torch.Tensor.clone, torch.Tensor.float, F.silu)
    },
}
