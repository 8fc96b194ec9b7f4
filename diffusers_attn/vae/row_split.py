"""`RowSplit`: a tensor of which this rank holds some rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import Rows
from .team import Team
from .unsplittable import unsplittable

Rule = Callable[..., Any]
FUNCTIONS: dict[Any, Rule] = {}
"""Rules of functions of PyTorch's Python interface, which are called in place of the function."""
OPERATORS: dict[Any, Rule] = {}
"""Rules of ATen operators, called with the operator and its arguments. `pointwise` ones need none."""


class RowSplit(torch.Tensor):
    """A tensor that is split by rows over the ranks of a team. Its shape is that of the full tensor.

    Operations give what they give for the full tensor, split or complete on every rank ("replicated"), or raise
    `AttentionProviderError`. No gradient is recorded.
    """

    local: Tensor
    """This rank's part, a plain tensor."""
    rows: Rows
    team: Team
    attention: Callable[..., Tensor]
    """Serves a call of `attention_dispatch`, see `attend.attention_of`."""

    @staticmethod
    def __new__(cls, local: Tensor, rows: Rows, team: Team) -> RowSplit:
        shape = _full_shape(local.shape, rows)
        self: RowSplit = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=None if local.is_contiguous() else _strides(tuple(local.shape), local.stride(), shape),
            dtype=local.dtype,
            device=local.device,
        )
        self.local, self.rows, self.team = local, rows, team
        return self

    def like(self, local: Tensor, **changed: Any) -> RowSplit:
        """`local` as a part of a tensor that is split as this one, with changed fields of `Rows`."""
        return RowSplit(local, self.rows.but(**changed) if changed else self.rows, self.team)

    def without_halo(self) -> RowSplit:
        """The same tensor with every row on one rank only: rows of padding belong to the first and the last shard."""
        rows = self.rows
        above, below = rows.halo
        if above == below == 0:
            return self
        shard, last = self.team.shard, rows.shards - 1
        bounds = (0, *(bound + above for bound in rows.bounds[1:-1]), rows.total + above + below)
        start = above if shard > 0 else 0
        end = self.local.shape[rows.dim] - (below if shard < last else 0)
        return self.like(self.local.narrow(rows.dim, start, end - start), bounds=bounds, halo=(0, 0))

    def populated(self, operation: str) -> RowSplit:
        """The same tensor. Raises AttentionProviderError on all ranks if one of them has no rows, as a slice may leave
        it, which `operation` does not support."""
        if min(self.rows.counts()) == 0:
            raise unsplittable(f"{operation} of rows that are split at {self.rows.bounds}, so that a rank has none")
        return self

    def full(self) -> Tensor:
        """The full tensor, gathered from all ranks, which must all call this."""
        split = self.without_halo()
        rows, team, dim = split.rows, split.team, split.rows.dim
        local = split.local.unflatten(dim, (rows.outer, rows.count(team.shard))).movedim(dim + 1, 0)
        counts = rows.counts()
        if len(set(counts)) > 1:  # a gather needs equal sizes
            padded = local.new_empty((max(counts), *local.shape[1:]))
            padded[: local.shape[0]] = local
            local = padded
        gathered = team.gather(local)
        parts = [part[:count] for part, count in zip(gathered, counts)]
        return torch.cat(parts).movedim(0, dim + 1).flatten(dim, dim + 1).contiguous()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RowSplit(shape={tuple(self.shape)}, {self.rows}, shard {self.team.shard}, local={self.local})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = FUNCTIONS.get(func)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = OPERATORS.get(func)
        if rule is None:
            if torch.Tag.pointwise in func.tags:
                rule = OPERATORS[func] = POINTWISE[func._schema.is_mutable]
            else:
                out = func.decompose(*args, **(kwargs or {}))  # as operators reach this in inference mode
                if out is NotImplemented:
                    raise unsplittable(f"{func} has no rule")
                return out
        return rule(func, *args, **(kwargs or {}))


POINTWISE: list[Rule] = []
"""Rules of operators that PyTorch tags as pointwise: of those that return a new tensor, and of those in place."""


@functools.lru_cache(maxsize=4096)
def _full_shape(own: torch.Size, rows: Rows) -> tuple[int, ...]:
    """The shape of the full tensor, from that of the local one."""
    return (*own[: rows.dim], rows.size, *own[rows.dim + 1 :])


@functools.lru_cache(maxsize=4096)
def _strides(own: tuple[int, ...], steps: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Strides of the full tensor in the order of a local tensor that is not contiguous, and contiguous in no memory
    format in which that one is not.

    Args:
        own: shape of the local tensor.
        steps: its strides.
        shape: shape of the full tensor.
    """
    order = sorted(range(len(own)), key=lambda dim: (-steps[dim], dim))
    strides, is_dense = [0] * len(own), True
    full = local = 1
    for dim in reversed(order):
        strides[dim] = full
        is_dense &= own[dim] == 1 or steps[dim] == local
        full *= shape[dim]
        local *= own[dim]
    return strides if is_dense else [2 * stride for stride in strides]
