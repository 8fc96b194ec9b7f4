"""`CPHalo`: extends a shard by the adjacent entries of other ranks, which a convolution reads.

Each rank sends every other rank the entries that it reads, which may come from several ranks. On a mesh with two axes,
no single exchange reaches all ranks. There the edges of all shards are gathered, or all entries if these are no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....cp_plans.advanced import CPHalo
from ....cp_plans.plan import ParamId
from ....errors import AttentionProviderError
from ...comm import collectives
from ...comm.group import Group
from ...sequences import sharding
from ...sequences.sharding import Shards, Span
from ...sequences.tracker import SequenceTracker
from ..find_argument import argument_of
from ..within import check_called
from .base import Place, SetHook


def hooks(place: Place, spec: CPHalo) -> Iterator[SetHook]:
    """The hooks of a module with a halo."""
    module, tracker = place.module, place.tracker
    length = None if spec.length is None else argument_of(module, place.path, ParamId(spec.length))
    add = AddHalo(tracker, place.path, spec, length)
    yield functools.partial(module.register_forward_pre_hook, add, with_kwargs=True)
    yield functools.partial(module.register_forward_hook, CutHalo(tracker, spec))


class AddHalo:
    """A forward pre-hook that extends the first argument by its halo.

    Args:
        length: name and position of the argument that holds the number of entries, if there is one.
    """

    def __init__(
        self, tracker: SequenceTracker, path: str, spec: CPHalo, length: tuple[str | None, int | None] | None = None
    ) -> None:
        self.tracker, self.path, self.spec, self.length = tracker, path, spec, length

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise AttentionProviderError(
                f"the plan has halo for the first argument of '{self.path}', which was not given a tensor there. "
                "Name a module that is called with it by position."
            )
        check_called(self, module)
        new_args, new_kwargs = [with_halo(self.tracker, self.spec, args[0]), *args[1:]], dict(kwargs)
        if self.length is not None:
            name, index = self.length
            where: Any = new_kwargs if name in new_kwargs else new_args
            key: Any = name if name in new_kwargs else index
            self.tracker.global_length(self.spec.sequence, where[key])  # checks the value
            where[key] += sum(_halo_lengths(self.tracker, self.spec))
        return tuple(new_args), new_kwargs


class CutHalo:
    """A forward hook that cuts the halo off the output."""

    def __init__(self, tracker: SequenceTracker, spec: CPHalo) -> None:
        self.tracker, self.spec = tracker, spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        own = self.tracker.shards((self.spec.sequence,)).sizes[self.tracker.mesh.rank]
        before, behind = _halo_lengths(self.tracker, self.spec)
        each = output.shape[self.spec.dim] // (before + own + behind) if self.spec.grouped else 1
        return output.narrow(self.spec.dim, before * each, own * each)


def _halo_lengths(tracker: SequenceTracker, spec: CPHalo) -> tuple[int, int]:
    """Number of entries in the halo before this rank's own entries, and after them."""
    tracker.check_in_order(spec.sequence, "a CPHalo")
    shards = tracker.shards((spec.sequence,))
    ((start, own),) = shards.spans[tracker.mesh.rank]
    return min(spec.reach, start), min(spec.reach, shards.total - start - own)


def with_halo(tracker: SequenceTracker, spec: CPHalo, tensor: Tensor) -> Tensor:
    """This rank's shard with its halo: up to `reach` entries before it and after it, from one other rank or several.

    Raises:
        AttentionProviderError: the tensor is not this rank's shard.
    """
    mesh, dim, reach = tracker.mesh, spec.dim % tensor.ndim, spec.reach
    if mesh.size == 1:
        return tensor
    tracker.check_in_order(spec.sequence, "a CPHalo")
    shards = tracker.shards((spec.sequence,))
    ((start, own),) = shards.spans[mesh.rank]
    if tensor.shape[dim] % own if spec.grouped and own else tensor.shape[dim] != own:
        raise AttentionProviderError(
            f"Expected {'a multiple of ' if spec.grouped else ''}{own} entries of '{spec.sequence}' in dimension {dim} "
            "on this rank, got a tensor of shape "
            f"{list(tensor.shape)}. Split it before this module: CPInput(..., sequence='{spec.sequence}')."
        )
    if spec.grouped:
        tensor = tensor.unflatten(dim, (own, -1))
    before, behind = _halo_lengths(tracker, spec)
    if 1 in (mesh.ring.size, mesh.ulysses.size):
        group = mesh.ulysses if mesh.ring.size == 1 else mesh.ring
        tensor = _WithOthers.apply(tensor, dim, _exchange_of(shards, group.rank, reach), before, group)
    elif min(shards.sizes) < reach or 2 * reach * mesh.size >= shards.total:
        every = sharding.gather(tensor, shards, dim, mesh)
        tensor = every.narrow(dim, start - before, before + own + behind)
    else:
        edges = torch.cat([tensor.narrow(dim, 0, reach), tensor.narrow(dim, own - reach, reach)], dim=dim)
        every = sharding.gather(edges, Shards.contiguous(2 * reach * mesh.size, mesh.size), dim, mesh)
        parts = [tensor]
        if before:
            parts.insert(0, every.narrow(dim, (2 * mesh.rank - 1) * reach, reach))
        if behind:
            parts.append(every.narrow(dim, 2 * (mesh.rank + 1) * reach, reach))
        tensor = torch.cat(parts, dim=dim)
    return tensor.flatten(dim, dim + 1) if spec.grouped else tensor


class _Exchange(NamedTuple):
    """The entries that this rank exchanges with each rank."""

    sent: tuple[Span, ...]
    """For each rank, the entries of this rank that it reads."""
    received: tuple[int, ...]
    """For each rank, the number of its entries that this rank reads."""


def _exchange_of(shards: Shards, rank: int, reach: int) -> _Exchange:
    """The exchange of a rank. Spans count from its first entry."""
    ends = [(start, start + own) for ((start, own),) in shards.spans]

    def part(owner: int, other: int) -> Span:
        """The entries of `owner` that another rank reads: its last ones, or its first."""
        start, end = ends[owner]
        begin = max(start, ends[other][0] - reach) if owner < other else start
        length = (end if owner < other else min(end, ends[other][1] + reach)) - begin
        return (begin - start, length) if length > 0 and owner != other else (0, 0)

    ranks = range(len(ends))
    return _Exchange(tuple(part(rank, each) for each in ranks), tuple(part(each, rank)[1] for each in ranks))


class _WithOthers(torch.autograd.Function):
    """`tensor` with the entries of other ranks, `before` of them before it and the rest after. The adjoint sends their
    gradients back to their owners, which add them."""

    @staticmethod
    def forward(ctx, tensor, dim: int, ranges: _Exchange, before: int, group: Group):  # type: ignore[no-untyped-def]
        ctx.dim, ctx.ranges, ctx.before, ctx.group, ctx.own = dim, ranges, before, group, tensor.shape[dim]
        rows = tensor.movedim(dim, 0)
        sent = torch.cat([rows.narrow(0, *span) for span in ranges.sent])
        lengths = [length for _, length in ranges.sent]
        arrived = collectives.wait(collectives.start_all_to_all(sent, lengths, ranges.received, group), group)
        behind = arrived.narrow(0, before, arrived.shape[0] - before)
        return torch.cat([arrived.narrow(0, 0, before), rows, behind]).movedim(0, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = collectives.depends_on(grad, grad, sent_over=ctx.group)
        rows, lengths = grad.movedim(ctx.dim, 0), [length for _, length in ctx.ranges.sent]
        of_others = torch.cat([rows.narrow(0, 0, ctx.before), rows[ctx.before + ctx.own :]])
        arrived = collectives.start_all_to_all(of_others, ctx.ranges.received, lengths, ctx.group)
        arrived = collectives.wait(arrived, ctx.group)
        total = rows.narrow(0, ctx.before, ctx.own).to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        for span, part in zip(ctx.ranges.sent, arrived.split(lengths)):
            total.narrow(0, *span).add_(part)
        return total.to(grad.dtype).movedim(0, ctx.dim), None, None, None, None
