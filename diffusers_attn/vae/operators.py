"""Rules of ATen operators that treat every element or every row alone: pointwise operators, norms of channels,
reductions and concatenations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .alignment import aligned, local_part, same_halo
from .row_split import OPERATORS, POINTWISE, RowSplit
from .unsplittable import unsplittable

aten = torch.ops.aten


def rule(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the rule of these operators."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            OPERATORS[operator] = function
        return function

    return register


def pointwise(func: Any, *args: Any, **kwargs: Any) -> RowSplit:
    """Computes every element from the elements at the same place."""
    split, given = _pointwise_arguments(func, args, kwargs)
    out = func(*given, **kwargs)
    shift = out.ndim - split.local.ndim
    return split.like(out, dim=split.rows.dim + shift) if shift else split.like(out)


def _pointwise_in_place(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """As `pointwise`, and writes the result into the first argument."""
    if not isinstance(args[0], RowSplit):
        raise unsplittable(f"{func} writes split values into a tensor that is not split")
    _, given = _pointwise_arguments(func, args, kwargs)
    if given[0] is not args[0].local:
        raise unsplittable(f"{func} writes into padded rows")
    func(*given, **kwargs)
    return args[0]


def _pointwise_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[RowSplit, list[Any]]:
    """A split argument, and all positional arguments as local tensors."""
    if kwargs and any(isinstance(each, Tensor) for each in kwargs.values()):
        raise unsplittable(f"{func} has no rule for tensors that are passed by name")
    given = list(args)
    places = [index for index, each in enumerate(args) if isinstance(each, Tensor)]
    if len(places) == 1:
        split = args[places[0]]
        given[places[0]] = split.local
        return split, given
    split, local = aligned(func, [args[index] for index in places])
    for index, each in zip(places, local):
        given[index] = each
    return split, given


POINTWISE += [pointwise, _pointwise_in_place]
rule(
    aten._to_copy.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten._prelu_kernel.default,
)(pointwise)
rule(aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)(_pointwise_in_place)


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default)
def _new(func: Any, tensor: RowSplit, *args: Any, **kwargs: Any) -> Tensor:
    return func(tensor.local, *args, **kwargs)


@functools.cache
def _place(func: Any, name: str) -> int | None:
    return next((index for index, each in enumerate(func._schema.arguments) if each.name == name), None)


def argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """The argument of an operator with this name, given by place or by name."""
    index = _place(func, name)
    return kwargs.get(name, args[index] if index is not None and index < len(args) else default)


@rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.linalg_vector_norm.default,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.prod.dim_int,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.logsumexp.default,
    aten.cumsum.default,
    aten.glu.default,
)
def _reduction(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Reduces dimensions, or normalises within one."""
    split = args[0].without_halo()
    dims = argument(func, args, kwargs, "dim", None)
    dims = range(split.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = [dim % split.ndim for dim in dims]
    keepdim = func in _KEEPING or argument(func, args, kwargs, "keepdim", False)
    if split.rows.dim in dims:
        split.populated(f"{func}")
    local = func(split.local, *args[1:], **kwargs)
    if split.rows.dim not in dims:
        removed = 0 if keepdim else sum(dim < split.rows.dim for dim in dims)
        return split.like(local, dim=split.rows.dim - removed)
    if func is aten.sum.dim_IntList:
        return split.team.sum(local)
    if func is aten.mean.dim:
        rows = split.rows
        return split.team.sum(local * (rows.count(split.team.shard) / rows.total))
    if func in (aten.amax.default, aten.amin.default):
        return func(split.team.gather(local), [0])
    raise unsplittable(f"{func} reduces the split dimension")


@rule(aten.sum.default, aten.mean.default)
def _full_reduction(func: Any, split: RowSplit, **kwargs: Any) -> Any:
    return _reduction(aten.sum.dim_IntList if func is aten.sum.default else aten.mean.dim, split, None, **kwargs)


@rule(aten.index_select.default)
def _index_select(func: Any, split: RowSplit, dim: int, index: Tensor) -> RowSplit:
    if dim % split.ndim == split.rows.dim or isinstance(index, RowSplit):
        raise unsplittable(f"{func} of rows")
    return split.like(func(split.local, dim, index))


@rule(aten.flip.default)
def _flip(func: Any, split: RowSplit, dims: Sequence[int]) -> RowSplit:
    if split.rows.dim in [dim % split.ndim for dim in dims]:
        raise unsplittable(f"{func} of rows")
    return split.like(func(split.local, dims))


_KEEPING = (aten._softmax.default, aten._log_softmax.default, aten.cumsum.default, aten.glu.default)
"""Operators that keep the dimension in which they work."""


@rule(aten.native_layer_norm.default, aten._fused_rms_norm.default)
def _norm_of_last(func: Any, split: RowSplit, shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if split.rows.dim >= split.ndim - len(shape):
        raise unsplittable(f"{func} normalises over the split dimension")
    return tuple(split.like(each) for each in func(split.local, shape, *args, **kwargs))


@rule(aten.cat.default)
def cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> RowSplit:
    """Concatenates tensors; `func` does so with plain ones."""
    splits = [each for each in tensors if isinstance(each, RowSplit)]
    first = splits[0]
    dim %= first.local.ndim
    if dim == first.rows.dim:
        return _cat_rows(func, [each.without_halo() if isinstance(each, RowSplit) else each for each in tensors])
    place = first.rows.dim - first.local.ndim
    tensors = same_halo(tensors, place)
    first = next(each for each in tensors if isinstance(each, RowSplit))
    return first.like(func([local_part(func, each, place, first) for each in tensors], dim))


def _cat_rows(func: Any, tensors: Sequence[Tensor]) -> RowSplit:
    """Concatenates along the split dimension what slices of one tensor gave: each rank's parts stay neighbours."""
    bounds: list[int] = []
    last = 0
    for each in tensors:
        if not isinstance(each, RowSplit) or each.rows.outer != 1:
            raise unsplittable(f"{func} concatenates rows")
        holders = [shard for shard, count in enumerate(each.rows.counts()) if count]
        if holders and holders[0] < last:
            raise unsplittable(f"{func} concatenates rows that belong to ranks in another order")
        last = holders[-1] if holders else last
        bounds = [one + other for one, other in zip(bounds, each.rows.bounds)] if bounds else list(each.rows.bounds)
    first = tensors[0]
    assert isinstance(first, RowSplit)
    local = func([each.local for each in tensors if isinstance(each, RowSplit)], first.rows.dim)
    return first.like(local, bounds=tuple(bounds))


@rule(aten.stack.default)
def _stack(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> RowSplit:
    dim %= tensors[0].ndim + 1
    return cat(aten.cat.default, [each.unsqueeze(dim) for each in tensors], dim)


@rule(aten.repeat.default)
def _repeat(func: Any, split: RowSplit, repeats: Sequence[int]) -> RowSplit:
    dim = split.rows.dim + len(repeats) - split.ndim
    if repeats[dim] != 1:
        split = split.without_halo()
        return split.like(func(split.local, repeats), dim=dim, outer=split.rows.outer * repeats[dim])
    return split.like(func(split.local, repeats), dim=dim)


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(func: Any, split: RowSplit, factor: int) -> RowSplit:
    split = _plain_rows(func, split, split.ndim - 2)
    return split.like(func(split.local, factor), bounds=split.rows.scaled(factor).bounds)


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(func: Any, split: RowSplit, factor: int) -> RowSplit:
    split = _plain_rows(func, split, split.ndim - 2)
    rows = split.rows.divided(factor)
    if rows is None:
        raise unsplittable(f"{func} by {factor} of rows that are split at {split.rows.bounds}")
    return split.like(func(split.local, factor), bounds=rows.bounds)


def _plain_rows(func: Any, split: RowSplit, dim: int) -> RowSplit:
    split = split.without_halo()
    if split.rows.dim != dim or split.rows.outer != 1:
        raise unsplittable(f"{func} of a tensor that is split in dimension {split.rows.dim}")
    return split
