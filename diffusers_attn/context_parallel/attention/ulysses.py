"""Ulysses (Jacobs et al., arXiv 2309.14509): the ranks exchange parts of the sequence for heads.

Before the exchange every rank has all heads of its tokens. After it every rank has all tokens for its heads, and
attends to them by itself with any kernel. A second exchange restores the first layout. Neither tokens nor heads need to
divide evenly: every rank has its own sizes.

The exchange to heads packs one copy (`[rank][seq, batch, heads of that rank, head_dim]`), and the received tensor needs
no further copy. The exchange back sends the tensor as it is and copies the received one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...tracing.symbolic import ceil_div, constant
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
            rank's heads, and the index of the first of these heads.

    Returns:
        `[batch, local queries, heads, value_head_dim]`.
    """
    heads, kv_heads, repeats = split_heads(constant(query.shape[2]), constant(key.shape[2]), group.size)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    queries, keys = HeadLayout(group, query_sizes, heads), HeadLayout(group, key_sizes, kv_heads)
    query, key, value = TokensToHeads.apply((queries, keys, keys), query, key, value)
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
    """Exchanges several tensors at once. It only moves data, so its adjoint is the exchange back."""

    @staticmethod
    def forward(ctx, layouts: tuple[HeadLayout, ...], *tensors):  # type: ignore[no-untyped-def]
        ctx.layouts = layouts
        return _move(_start_to_heads, _finish_to_heads, layouts, tensors)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return None, *_move_back(_start_to_tokens, _finish_to_tokens, ctx.layouts, grads)


class HeadsToTokens(torch.autograd.Function):
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
    in_flight = [start(tensor, layout) for tensor, layout in zip(tensors, layouts)]
    return tuple(
        finish(arrived, layout, tensor.shape[0], tensor.shape[-1])
        for arrived, layout, tensor in zip(in_flight, layouts, tensors)
    )


def _start_to_heads(tensor: Tensor, layout: HeadLayout) -> Tensor:
    """Sends `[batch, local tokens, all heads, head_dim]`."""
    group, (batch, tokens, _, head_dim) = layout.group, tensor.shape
    pieces = tensor.transpose(0, 1).split(layout.heads, dim=2)
    if len(set(layout.heads)) == 1:
        packed = torch.stack(pieces).flatten()
    else:
        packed = torch.cat([piece.flatten() for piece in pieces])
    send = [tokens * batch * heads * head_dim for heads in layout.heads]
    receive = [count * batch * layout.heads[group.rank] * head_dim for count in layout.tokens]
    return collectives.start_all_to_all(packed, send, receive, group)


def _finish_to_heads(arrived: Tensor, layout: HeadLayout, batch: int, head_dim: int) -> Tensor:
    """Returns `[batch, all tokens, local heads, head_dim]`."""
    arrived = collectives.wait(arrived, layout.group)
    return arrived.view(sum(layout.tokens), batch, layout.heads[layout.group.rank], head_dim).transpose(0, 1)


def _start_to_tokens(tensor: Tensor, layout: HeadLayout) -> Tensor:
    """Sends `[batch, all tokens, local heads, head_dim]`."""
    group, (batch, _, own_heads, head_dim) = layout.group, tensor.shape
    send = [tokens * batch * own_heads * head_dim for tokens in layout.tokens]
    receive = [layout.tokens[group.rank] * batch * heads * head_dim for heads in layout.heads]
    return collectives.start_all_to_all(tensor.transpose(0, 1).flatten(), send, receive, group)


def _finish_to_tokens(arrived: Tensor, layout: HeadLayout, batch: int, head_dim: int) -> Tensor:
    """Returns `[batch, local tokens, all heads, head_dim]`."""
    tokens = layout.tokens[layout.group.rank]
    pieces = collectives.wait(arrived, layout.group).split(
        [tokens * batch * heads * head_dim for heads in layout.heads]
    )
    shaped = [piece.view(tokens, batch, heads, head_dim) for piece, heads in zip(pieces, layout.heads)]
    return torch.cat(shaped, dim=2).transpose(0, 1)
