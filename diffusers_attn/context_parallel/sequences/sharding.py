"""Which rank holds which tokens, and how tensors are split and gathered accordingly.

Adjoints are the true ones. Splitting reads a part of this rank's own copy of a tensor, so its gradient is that part,
with zeros elsewhere, and no communication. What is gathered is read by every rank, so the gradient of a part is the sum
of what all ranks have for it. With these two, the plain mean of gradients over the ranks, which is what DDP and FSDP
take, is the gradient of a single process, for parameters before the split, between, and after the gather.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tracing.functions import result
from ...tracing.symbolic import ceil_div, sort
from ..comm import collectives
from ..comm.gather_rows import gather_rows
from ..comm.group import Group
from ..mesh import ContextParallelMesh

Span = tuple[int, int]
"""Consecutive tokens of the whole sequence: (start, length)."""


class Shards(NamedTuple):
    """The spans that each rank holds, in the order in which it holds them. Every rank knows those of all ranks, so no
    sizes are exchanged."""

    spans: tuple[tuple[Span, ...], ...]

    @staticmethod
    def contiguous(length: int, ranks: int, block: int = 1) -> Shards:
        """The sequence in order; where it does not divide, the first ranks have one token more. With a `block`, of
        which `length` is a multiple, so many tokens more."""
        spans = _cut(length // block, ranks)
        return Shards(tuple(((start * block, size * block),) for start, size in spans))

    @staticmethod
    def zigzag(length: int, ranks: int) -> Shards:
        """Rank r holds the r-th part of `2 * ranks` from the front and the r-th from the back. Under causal attention,
        where late queries see more keys than early ones, all ranks then have the same work."""
        parts = _cut(length, 2 * ranks)
        return Shards(tuple((parts[rank], parts[-1 - rank]) for rank in range(ranks)))

    @staticmethod
    def joint(*sequences: Shards) -> Shards:
        """Several sequences, each split on its own and joined on every rank: (text, image) as text 0, image 0 on rank
        0. The whole sequence is all of the first sequence, then all of the second."""
        spans: list[tuple[Span, ...]] = [()] * len(sequences[0].spans)
        for index, sequence in enumerate(sequences):
            before = sum(other.total for other in sequences[:index])
            for rank, own in enumerate(sequence.spans):
                spans[rank] += tuple((start + before, length) for start, length in own)
        return Shards(tuple(spans))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(length for _, length in spans) for spans in self.spans)

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.sizes)

    def merged(self, neighbours: int) -> Shards:
        """What groups of that many neighbouring ranks hold together."""
        starts = range(0, len(self.spans), neighbours)
        return Shards(tuple(sum(self.spans[start : start + neighbours], ()) for start in starts))

    def in_blocks(self, block: int) -> Shards:
        """The same shards, counted in blocks of `block` tokens. Every span must start and end at a block."""
        return Shards(tuple(in_blocks(spans, block) for spans in self.spans))

    def sorted(self) -> Shards:
        """The same tokens on every rank, in the order of the sequence."""
        return Shards(tuple(tuple(sort(spans)) for spans in self.spans))

    def without(self, rank: int) -> tuple[Span, ...]:
        """The spans of all ranks but `rank`, in the order of the ranks."""
        return sum(self.spans[:rank] + self.spans[rank + 1 :], ())


def _cut(length: int, parts: int) -> list[Span]:
    sizes = [ceil_div(length - part, parts) for part in range(parts)]
    return [(sum(sizes[:part]), size) for part, size in enumerate(sizes)]


def in_blocks(spans: tuple[Span, ...], block: int) -> tuple[Span, ...]:
    """`spans`, which start and end at blocks of `block` tokens, counted in blocks."""
    return spans if block == 1 else tuple((start // block, length // block) for start, length in spans)


def take(tensor: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """The tokens of `spans` along `dim`, in that order; a view if they are one piece."""
    spans = _joined(spans)
    pieces = [tensor.narrow(dim, start, length) for start, length in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def in_order(tensor: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """Sorts a tensor whose tokens along `dim` are those of `spans` into the order of the sequence."""
    pieces = sort((*span, offset) for span, offset in zip(spans, _offsets(spans)))
    return take(tensor, tuple((offset, length) for _, length, offset in pieces), dim)


def out_of_order(tensor: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """The inverse of `in_order`: returns tokens to the order of `spans`."""
    places = sort((*span, index) for index, span in enumerate(spans))
    offsets = _offsets(tuple((start, length) for start, length, _ in places))
    pieces = sort((index, offset, length) for (_, length, index), offset in zip(places, offsets))
    return take(tensor, tuple((offset, length) for _, offset, length in pieces), dim)


def _offsets(spans: tuple[Span, ...]) -> list[int]:
    return [sum(length for _, length in spans[:index]) for index in range(len(spans))]


def _joined(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """The same tokens in as few spans as possible."""
    joined: list[Span] = []
    for start, length in spans:
        if joined and (length == 0 or sum(joined[-1]) == start):
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        elif length or len(spans) == 1:
            joined.append((start, length))
    return tuple(joined) or ((0, 0),)


def split(tensor: Tensor, shards: Shards, dim: int, rank: int) -> Tensor:
    """This rank's shard of a tensor that all ranks have alike."""
    return take(tensor, shards.spans[rank], dim)


def gather(tensor: Tensor, shards: Shards, dim: int, mesh: ContextParallelMesh) -> Tensor:
    """The whole tensor, in the order of the sequence, from every rank's shard. Its gradient is the sum over ranks."""
    inner = shards.sizes[mesh.ring.rank * mesh.ulysses.size :][: mesh.ulysses.size]
    outer = shards.merged(mesh.ulysses.size).sizes
    tensor = _Gather.apply(tensor, dim, inner, mesh.ulysses)
    tensor = _Gather.apply(tensor, dim, outer, mesh.ring)
    return in_order(tensor, sum(shards.spans, ()), dim)


def alone(tensor: Tensor, shards: Shards, dim: int, rank: int) -> Tensor:
    """The whole tensor as `rank` would have it if nobody sent anything: zeros in the place of what others hold."""
    whole = tensor.new_zeros([*tensor.shape[:dim], shards.total, *tensor.shape[dim + 1 :]])
    start = 0
    for first, length in shards.spans[rank]:
        whole.narrow(dim, first, length).copy_(tensor.narrow(dim, start, length))
        start += length
    return whole


class _Gather(torch.autograd.Function):
    """Concatenation over the ranks of one group; backward is the reduce-scatter that is its adjoint."""

    @staticmethod
    def forward(ctx, tensor, dim, sizes, group: Group):  # type: ignore[no-untyped-def]
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        if group.size == 1:
            return tensor.view_as(tensor)
        return result(gather_rows(tensor.movedim(dim, 0), sizes, group).movedim(0, dim))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        group = ctx.group
        if group.size == 1:
            return grad, None, None, None
        rows = ctx.sizes[group.rank]
        grad = collectives.depends_on(grad, grad, sent_over=group)
        parts = collectives.start_all_to_all(grad.movedim(ctx.dim, 0), ctx.sizes, [rows] * group.size, group)
        total = collectives.sum_of_parts(collectives.wait(parts, group), group.size)
        return total.to(grad.dtype).movedim(0, ctx.dim), None, None, None
