"""Attention between split tokens: every rank attends with its own queries to the keys and values of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import AttentionCall
from .alignment import part_of
from .row_split import FUNCTIONS, RowSplit
from .unsplittable import unsplittable


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor],
) -> Tensor:
    """Attention of split tensors.

    Args:
        query, key, value: `[..., tokens, head_dim]`, of which at least one is split in the tokens or before them.
        mask: replicated or split, broadcast to `[..., query_len, key_len]`.
        compute: attention of plain tensors, called with query, key, value, mask and is_causal.
    """
    split = next(each for each in (query, key, value) if isinstance(each, RowSplit))
    place = split.rows.dim - split.ndim
    if place == -1:
        raise unsplittable("attention over split channels")
    if place < -2:  # each rank has some of the sequences, as in attention over time
        query, key, value = (_part(each, split, place) for each in (query, key, value))
        mask = None if mask is None else _part(mask, split, place)
        return split.like(compute(query, key, value, mask, is_causal))
    key, value = (each.full() if isinstance(each, RowSplit) else each for each in (key, value))
    if not isinstance(query, RowSplit):
        return compute(query, key, value, mask.full() if isinstance(mask, RowSplit) else mask, is_causal)
    query = query.without_halo()
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if isinstance(mask, RowSplit):
        mask = mask.full()
    if mask is not None and mask.ndim > 1:
        mask = part_of(mask, -2, query.rows, query.team)
    return query.like(compute(query.local, key, value, mask, False))


def _part(tensor: Tensor, split: RowSplit, place: int) -> Tensor:
    if not isinstance(tensor, RowSplit):
        return part_of(tensor, place, split.rows, split.team)
    if tensor.rows._replace(dim=0) != split.rows._replace(dim=0) or tensor.rows.dim - tensor.ndim != place:
        raise unsplittable(f"attention of tensors that are split as {split.rows} and {tensor.rows}")
    return tensor.local


def attention_of(split: RowSplit, call: AttentionCall, serve: Callable[[AttentionCall], Tensor]) -> Tensor:
    """The result of an attention call that has split tensors.

    Args:
        split: a tensor of the call.
        call: the call, in either layout.
        serve: serves the same call with plain tensors.
    """

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor if call.layout == "bhsd" else tensor.transpose(1, 2)

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        query, key, value = heads_first(query), heads_first(key), heads_first(value)
        return heads_first(serve(call._replace(query=query, key=key, value=value, mask=mask, is_causal=is_causal)))

    if call.dropout_p or not (call.mask is None or isinstance(call.mask, Tensor)):
        raise unsplittable(f"attention with dropout_p={call.dropout_p} and a mask of {type(call.mask).__name__}")
    query, key, value = heads_first(call.query), heads_first(call.key), heads_first(call.value)
    return heads_first(attend(query, key, value, call.mask, call.is_causal, compute))


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **options)

    if dropout_p:
        raise unsplittable("attention with dropout (call vae.eval())")
    return attend(query, key, value, attn_mask, is_causal, compute)


FUNCTIONS[F.scaled_dot_product_attention] = _scaled_dot_product_attention
RowSplit.attention = attention_of
