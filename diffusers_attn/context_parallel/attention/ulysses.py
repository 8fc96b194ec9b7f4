"""Ulysses (Jacobs et al., arXiv 2309.14509): the ranks exchange parts of the sequence for heads.

Before the exchange every rank has all heads of its tokens. After it every rank has all tokens for its heads, and
attends to them by itself with any kernel. A second exchange restores the first layout. Neither tokens nor heads need to
divide evenly: every rank has its own sizes.

The exchange to heads packs one copy (`[rank][seq, batch, heads of that rank, head_dim]`), and the received tensor needs
no further copy. The exchange back sends the tensor as it is and copies the received one. Query, key and value of equal
shapes are one exchange, in which they are neighbours along the batch. They arrive as views of one tensor, with the
distance of tokens that a packed projection has too. An eager step of Flux on two ranks then has 115 exchanges, and 229
without; its time has not been measured (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...tracing.symbolic import ceil_div, constant, equal
from ..comm import collectives
from ..comm.collectives import depends_on
from ..comm.group import Group


class HeadLayout(NamedTuple):
    """The numbers of tokens (before the exchange) and heads (after it) of each rank of `group`."""

    group: Group
    tokens: tuple[int, ...]
    heads: tuple[int, ...]


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group,
    query_sizes: tuple[int, ...],
    key_sizes: tuple[int, ...],
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of `group`.

    Args:
        query: `[batch, local queries, heads, head_dim]`.
        key, value: `[batch, local keys, kv_heads, head_dim]`.
        query_sizes, key_sizes: number of tokens of every rank.
        attention: computes the output from query, key and value with all tokens (in the order of the ranks) of this
            rank's heads, and the index of the first of these heads. The tensors may have a distance between tokens.

    Returns:
        `[batch, local queries, heads, value_head_dim]`.
    """
    heads, kv_heads, repeats = split_heads(constant(query.shape[2]), constant(key.shape[2]), group.size)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    queries, keys = HeadLayout(group, query_sizes, heads), HeadLayout(group, key_sizes, kv_heads)
    together = all(equal(tuple(query.shape), tuple(other.shape)) for other in (key, value))
    layouts = (queries,) if together and equal(query_sizes, key_sizes) else (queries, keys, keys)
    query, key, value = TokensToHeads.apply(layouts, query, key, value)
    out = attention(query, key, value, sum(heads[: group.rank]))
    return HeadsToTokens.apply((queries,), out)[0]


def split_heads(heads: int, kv_heads: int, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The numbers of query heads and of key heads of each rank, and the number of copies of each key head.

    A query head and its key head must be on the same rank. So key heads are split, and query heads follow. If the key
    heads do not divide among the ranks, they are repeated by the smallest factor that lets them divide.
    """
    groups = heads // kv_heads
    repeats = next((n for n in range(1, groups + 1) if groups % n == 0 and kv_heads * n % ranks == 0), groups)
    kv_split = tuple(ceil_div(kv_heads * repeats - rank, ranks) for rank in range(ranks))
    return tuple(count * groups // repeats for count in kv_split), kv_split, repeats


class TokensToHeads(torch.autograd.Function):
    """Sends tensors in one exchange, if there is one layout, or else each in its own, all in flight at once. It only
    moves data, so its adjoint is the exchange back."""

    @staticmethod
    def forward(ctx, layouts: tuple[HeadLayout, ...], *tensors):  # type: ignore[no-untyped-def]
        ctx.layouts = layouts
        return _move(_start_to_heads, _finish_to_heads, layouts, tensors)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, *_move_back(_start_to_tokens, _finish_to_tokens, ctx.layouts, grads)


class HeadsToTokens(torch.autograd.Function):
    """The inverse of `TokensToHeads`."""

    @staticmethod
    def forward(ctx, layouts: tuple[HeadLayout, ...], *tensors):  # type: ignore[no-untyped-def]
        ctx.layouts = layouts
        return _move(_start_to_tokens, _finish_to_tokens, layouts, tensors)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, *_move_back(_start_to_heads, _finish_to_heads, ctx.layouts, grads)


def _move_back(start, finish, layouts, grads):  # type: ignore[no-untyped-def]
    first, *others = grads
    return _move(start, finish, layouts, [depends_on(first, first, sent_over=layouts[0].group), *others])


def _move(start, finish, layouts, tensors):  # type: ignore[no-untyped-def]
    step = len(tensors) // len(layouts)
    sent = [tensors[at : at + step] for at in range(0, len(tensors), step)]
    in_flight = [start(each, layout) for each, layout in zip(sent, layouts)]
    return tuple(
        tensor for each, layout, arrived in zip(sent, layouts, in_flight) for tensor in finish(arrived, layout, each)
    )


def _start_to_heads(tensors: Sequence[Tensor], layout: HeadLayout) -> Tensor:
    """Sends tensors of the shape `[batch, local tokens, all heads, head_dim]`."""
    group, (batch, tokens, _, head_dim) = layout.group, tensors[0].shape
    batch = batch * len(tensors)
    if len(set(layout.heads)) == 1:
        # Views of four dimensions: PyTorch concatenates tensors of more dimensions by one kernel for each of them.
        shape = group.size, layout.heads[0]
        views = [tensor.transpose(0, 1).unflatten(2, shape).flatten(3).permute(2, 0, 1, 3) for tensor in tensors]
        packed = torch.cat(views, dim=2).flatten()
    else:
        pieces = zip(*[tensor.transpose(0, 1).split(layout.heads, dim=2) for tensor in tensors])
        packed = torch.cat([torch.cat(of_rank, dim=1).flatten() for of_rank in pieces])
    send = [tokens * batch * heads * head_dim for heads in layout.heads]
    receive = [count * batch * layout.heads[group.rank] * head_dim for count in layout.tokens]
    return collectives.start_all_to_all(packed, send, receive, group)


def _finish_to_heads(arrived: Tensor, layout: HeadLayout, sent: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns tensors of the shape `[batch, all tokens, local heads, head_dim]`."""
    arrived = collectives.wait(arrived, layout.group)
    batch, head_dim = sent[0].shape[0], sent[0].shape[-1]
    shape = sum(layout.tokens), len(sent) * batch, layout.heads[layout.group.rank], head_dim
    return arrived.view(shape).transpose(0, 1).chunk(len(sent))


def _start_to_tokens(tensors: Sequence[Tensor], layout: HeadLayout) -> Tensor:
    """Sends tensors of the shape `[batch, all tokens, local heads, head_dim]`."""
    group, (batch, _, own_heads, head_dim) = layout.group, tensors[0].shape
    batch = batch * len(tensors)
    send = [tokens * batch * own_heads * head_dim for tokens in layout.tokens]
    receive = [layout.tokens[group.rank] * batch * heads * head_dim for heads in layout.heads]
    views = [tensor.transpose(0, 1) for tensor in tensors]
    packed = views[0] if len(views) == 1 else torch.cat(views, dim=1)
    return collectives.start_all_to_all(packed.flatten(), send, receive, group)


def _finish_to_tokens(arrived: Tensor, layout: HeadLayout, sent: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns tensors of the shape `[batch, local tokens, all heads, head_dim]`."""
    tokens = layout.tokens[layout.group.rank]
    batch, head_dim = sent[0].shape[0], sent[0].shape[-1]
    rows = tokens * len(sent) * batch
    pieces = collectives.wait(arrived, layout.group).split([rows * heads * head_dim for heads in layout.heads])
    shaped = [piece.view(tokens, len(sent) * batch, heads, head_dim) for piece, heads in zip(pieces, layout.heads)]
    return torch.cat(shaped, dim=2).transpose(0, 1).chunk(len(sent))
