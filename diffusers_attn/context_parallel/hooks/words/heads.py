"""`CPHeads`: exchanges tokens for heads around a module that computes each head separately, as Ulysses does.

The module's own code runs unchanged, with fewer heads and all tokens. On a mesh with two axes, heads are split along
both: first along Ulysses, then along the ring.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....cp_plans.advanced import CPHeads
from ....cp_plans.plan import ParamId
from ....errors import AttentionProviderError
from ....nested import describe
from ...attention.ulysses import HeadLayout, HeadsToTokens, TokensToHeads
from ...comm.group import Group
from ...mesh import ContextParallelMesh
from ...sequences.sharding import Shards
from ...sequences.tracker import SequenceTracker
from ..find_argument import argument_of
from .attention import hooks_with_all_tokens
from .base import Place, SetHook

Argument = tuple[str, int | None, tuple[int, int]]
"""Name and position of an argument with heads, and its dimensions of sequence and heads."""


def hooks(place: Place, spec: CPHeads) -> Iterator[SetHook]:
    """The hooks of a module that computes each head separately."""
    module, tracker, path = place.module, place.tracker, place.path
    arguments = [(name, argument_of(module, path, ParamId(name))[1], dims) for name, dims in spec.arguments.items()]
    yield functools.partial(module.register_forward_pre_hook, ToHeads(tracker, path, spec, arguments), with_kwargs=True)
    yield functools.partial(module.register_forward_hook, ToTokens(tracker, path, spec))
    yield from hooks_with_all_tokens(place)


class _HeadHook:
    """Base of both hooks. Only errors read `path`: a compiler makes a graph for every value that it reads."""

    def __init__(self, tracker: SequenceTracker, path: str, spec: CPHeads) -> None:
        self.tracker, self.path, self.spec = tracker, path, spec

    def shares(self) -> _Shares:
        """The distribution of tokens and heads.

        Raises:
            AttentionProviderError: the sequence was not split, or some rank has no token of it. On all ranks.
        """
        tracker, mesh, name = self.tracker, self.tracker.mesh, self.spec.sequence
        tracker.check_in_order(name, "a CPHeads")
        sizes = tracker.shards((name,)).sizes if name in tracker.lengths else (0,)
        if min(sizes) == 0:
            raise AttentionProviderError(
                f"'{self.path}' exchanges heads for the ranks' shards of '{name}', which has a length of {sum(sizes)}, "
                f"and every one of {mesh.size} ranks needs one. Split it before; or use fewer ranks."
            )
        inner, outer = _stages(mesh, sizes, self.spec.heads)
        stages = tuple(stage for stage in (inner, outer) if stage.group.size > 1)
        return _Shares(sizes, outer.heads[mesh.ring.rank], stages)

    def by_heads(
        self, value: Any, dims: tuple[int, int], length: int, heads: int, name: str | None
    ) -> tuple[Tensor, list[int]]:
        """A tensor as `[batch, tokens, heads, inner]`, and the shape that is flattened in its last dimension.

        Args:
            dims: dimensions of the sequence and of the heads.
            length: number of entries of the sequence in the tensor.
            heads: number of heads in the tensor.
            name: name of the argument; None for the output.
        """
        sequence, of_heads = dims
        if not isinstance(value, Tensor) or value.shape[sequence] % length or value.shape[of_heads] % heads:
            what = "the output" if name is None else f"argument '{name}'"
            raise AttentionProviderError(
                f"{what} of '{self.path}' is {describe(value)}, and its plan has a sequence of {length} in dimension "
                f"{sequence} and {heads} heads in dimension {of_heads}, or multiples. Correct them in its CPHeads."
            )
        tensor = value.movedim(dims, (1, 2)).unflatten(2, (heads, -1))
        return tensor.flatten(3), list(tensor.shape[3:])


class ToHeads(_HeadHook):
    """A forward pre-hook that gives a module all tokens of this rank's heads.

    Args:
        arguments: name and position of each argument with heads, and its dimensions of sequence and heads.
    """

    def __init__(self, tracker: SequenceTracker, path: str, spec: CPHeads, arguments: Sequence[Argument]) -> None:
        super().__init__(tracker, path, spec)
        self.arguments = arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rank = self.tracker.mesh.rank
        if self.tracker.mesh.size == 1:
            return args, kwargs
        new_args, new_kwargs = list(args), dict(kwargs)
        shares = self.shares()
        tensors, inners = [], []
        for name, index, dims in self.arguments:
            value = kwargs.get(name) if index is None or index >= len(args) else args[index]
            tensor, inner = self.by_heads(value, dims, shares.sizes[rank], self.spec.heads, name)
            tensors.append(tensor)
            inners.append(inner)
        tensors = list(shares.to_heads(tensors))
        for (name, index, dims), inner, tensor in zip(self.arguments, inners, tensors):
            if not self.tracker.gathers_others:
                tensor = _own_tokens(tensor, shares.sizes, rank)
            if shares.heads == 0:  # one head of zeros, because the module's code does not run without a head
                tensor = torch.cat([tensor, tensor.new_zeros(*tensor.shape[:2], 1, tensor.shape[3])], dim=2)
            tensor = tensor.unflatten(3, inner).flatten(2, 3).movedim((1, 2), dims)
            if index is None or index >= len(args):
                new_kwargs[name] = tensor
            else:
                new_args[index] = tensor
        return tuple(new_args), new_kwargs


class ToTokens(_HeadHook):
    """A forward hook that returns all heads of this rank's tokens."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.tracker.mesh.size == 1:
            return output
        shares, dims = self.shares(), self.spec.output
        tensor, inner = self.by_heads(output, dims, sum(shares.sizes), max(shares.heads, 1), None)
        tensor = shares.to_tokens(tensor.narrow(2, 0, shares.heads))
        return tensor.unflatten(3, inner).flatten(2, 3).movedim((1, 2), dims).contiguous()


class _Stage(NamedTuple):
    """An exchange between the ranks of one group."""

    group: Group
    sizes: tuple[int, ...]
    """For each rank of the group, its number of entries of the sequence."""
    heads: tuple[int, ...]
    """For each rank of the group, its number of heads after the exchange."""

    def layout(self, each: int) -> HeadLayout:
        """The layout of a tensor with `each` tokens for each entry of the sequence."""
        return HeadLayout(self.group, tuple(size * each for size in self.sizes), self.heads)


class _Shares(NamedTuple):
    """The distribution of a sequence's tokens, and of the heads."""

    sizes: tuple[int, ...]
    """For each rank, its number of entries of the sequence."""
    heads: int
    """Number of this rank's heads."""
    stages: tuple[_Stage, ...]

    def to_heads(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """`[batch, tokens of this rank, all heads, ...]` to `[batch, all tokens, heads of this rank, ...]`."""
        for stage in self.stages:
            mine = stage.sizes[stage.group.rank]
            layouts = tuple(stage.layout(tensor.shape[1] // mine) for tensor in tensors)
            tensors = TokensToHeads.apply(layouts, *tensors)
        return tensors

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """The inverse of `to_heads`, for one tensor."""
        for stage in reversed(self.stages):
            (tensor,) = HeadsToTokens.apply((stage.layout(tensor.shape[1] // sum(stage.sizes)),), tensor)
        return tensor


def _stages(mesh: ContextParallelMesh, sizes: tuple[int, ...], heads: int) -> tuple[_Stage, _Stage]:
    """The exchange along Ulysses, whose ranks have neighbouring shards, and then that of their joint shards along the
    ring."""
    step = mesh.ulysses.size
    together = [sizes[start : start + step] for start in range(0, len(sizes), step)]
    inner = _Stage(mesh.ulysses, together[mesh.ring.rank], Shards.contiguous(heads, step).sizes)
    rest = inner.heads[mesh.ulysses.rank]
    return inner, _Stage(mesh.ring, tuple(map(sum, together)), Shards.contiguous(rest, mesh.ring.size).sizes)


def _own_tokens(tensor: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """`tensor` with zeros for the tokens of other ranks."""
    each = tensor.shape[1] // sum(sizes)
    start, own = sum(sizes[:rank]) * each, sizes[rank] * each
    kept = torch.zeros_like(tensor)
    kept.narrow(1, start, own).copy_(tensor.narrow(1, start, own))
    return kept
