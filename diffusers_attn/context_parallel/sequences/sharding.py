"""Which rank holds which tokens, and how tensors are split and gathered accordingly.

Adjoints are the true ones. A split reads a part of this rank's own copy of a tensor. Its gradient is that of the part,
with zeros elsewhere, and needs no communication. A gathered tensor is read by every rank, and the gradient of a shard
is the sum of all ranks' gradients for it. The plain mean of gradients over the ranks, which DDP and FSDP compute, is
then the gradient of a single process, for parameters before the split, between, and after the gather.
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
"""Consecutive tokens of the full sequence: (start, length)."""


class Shards(NamedTuple):
    """The spans of all ranks. Every rank has them for all ranks, so that no sizes are exchanged."""

    spans: tuple[tuple[Span, ...], ...]
    """For each rank, its spans in the order in which it holds them."""

    @staticmethod
    def contiguous(length: int, ranks: int, block: int = 1) -> Shards:
        """One span for each rank, in order. If the length does not divide, the first ranks have one block more.

        Args:
            length: number of tokens, a multiple of `block`.
            block: number of tokens that stay together.
        """
        spans = _cut(length // block, ranks)
        return Shards(tuple(((start * block, size * block),) for start, size in spans))

    @staticmethod
    def zigzag(length: int, ranks: int) -> Shards:
        """The sequence in `2 * ranks` parts: rank r holds the r-th from the front and the r-th from the back.

        With causal attention, late queries attend to more keys than early ones. This gives all ranks the same work.
        """
        parts = _cut(length, 2 * ranks)
        return Shards(tuple((parts[rank], parts[-1 - rank]) for rank in range(ranks)))

    @staticmethod
    def joint(*sequences: Shards) -> Shards:
        """Several sequences, each split on its own and joined on every rank: rank 0 of (text, image) holds text 0, then
        image 0. The full sequence is all of the text, then all of the image."""
        spans: list[tuple[Span, ...]] = [()] * len(sequences[0].spans)
        for index, sequence in enumerate(sequences):
            before = sum(other.total for other in sequences[:index])
            for rank, own in enumerate(sequence.spans):
                spans[rank] += tuple((start + before, length) for start, length in own)
        return Shards(tuple(spans))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        return tuple(sum(length for _, length in spans) for spans in self.spans)

    @property
    def total(self) -> int:
        """Number of tokens of the full sequence."""
        return sum(self.sizes)

    def merged(self, group_size: int) -> Shards:
        """The shards of groups of `group_size` neighbouring ranks, which hold their tokens together."""
        starts = range(0, len(self.spans), group_size)
        return Shards(tuple(sum(self.spans[start : start + group_size], ()) for start in starts))

    def in_blocks(self, block: int) -> Shards:
        """The same shards, counted in blocks of `block` tokens. Every span must start and end at a block."""
        return Shards(tuple(in_blocks(spans, block) for spans in self.spans))

    def sorted(self) -> Shards:
        """The same tokens on every rank, in the order of the sequence."""
        return Shards(tuple(tuple(sort(spans)) for spans in self.spans))

    def without(self, rank: int) -> tuple[Span, ...]:
        """The spans of all other ranks, in the order of the ranks."""
        return sum(self.spans[:rank] + self.spans[rank + 1 :], ())


def _cut(length: int, parts: int) -> list[Span]:
    sizes = [ceil_div(length - part, parts) for part in range(parts)]
    return [(sum(sizes[:part]), size) for part, size in enumerate(sizes)]


def in_blocks(spans: tuple[Span, ...], block: int) -> tuple[Span, ...]:
    """Spans counted in blocks of `block` tokens. Every span must start and end at a block."""
    return spans if block == 1 else tuple((start // block, length // block) for start, length in spans)


def take(tensor: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """The tokens of `spans` along `dim`, in that order. A view if they are one piece."""
    spans = _joined(spans)
    pieces = [tensor.narrow(dim, start, length) for start, length in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def in_order(tensor: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """Sorts a tensor into the order of the sequence. Its tokens along `dim` are those of `spans`."""
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
    """The shard of `rank`, from a tensor that is the same on all ranks."""
    return take(tensor, shards.spans[rank], dim)


def gather(tensor: Tensor, shards: Shards, dim: int, mesh: ContextParallelMesh) -> Tensor:
    """The full tensor, in the order of the sequence, from every rank's shard. Its gradient is the sum over ranks."""
    inner = shards.sizes[mesh.ring.rank * mesh.ulysses.size :][: mesh.ulysses.size]
    outer = shards.merged(mesh.ulysses.size).sizes
    tensor = _Gather.apply(tensor, dim, inner, mesh.ulysses)
    tensor = _Gather.apply(tensor, dim, outer, mesh.ring)
    return in_order(tensor, sum(shards.spans, ()), dim)


def alone(tensor: Tensor, shards: Shards, dim: int, rank: int) -> Tensor:
    """The full tensor with zeros in place of the tokens of other ranks, as if these had sent nothing."""
    full = tensor.new_zeros([*tensor.shape[:dim], shards.total, *tensor.shape[dim + 1 :]])
    start = 0
    for first, length in shards.spans[rank]:
        full.narrow(dim, first, length).copy_(tensor.narrow(dim, start, length))
        start += length
    return full


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
