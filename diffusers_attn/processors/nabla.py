"""NABLA, the block-sparse attention of Kandinsky 5 and 6 SR, over several ranks.

A layer averages its queries and keys over blocks of 64 tokens. From the products of these means it chooses the blocks
of keys to which each block of queries attends, and adds a fixed pattern of near blocks. diffusers' processors compute
this mask in a function of their module, from all queries and keys. Over several ranks they call the function here
instead. It gathers the keys' means, a 64th of the keys' size, and computes the mask's rows for this rank's queries.
Everything else is diffusers' own code, and on one device so is that function.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..context_parallel.sequences.active import active
from ..errors import AttentionProviderError
from .overlay import Overlay, with_globals

PROCESSORS = (
    "diffusers.models.transformers.transformer_kandinsky.Kandinsky5AttnProcessor",
    "diffusers.models.transformers.transformer_kandinsky6_sr.Kandinsky6SRAttnProcessor",
)
BLOCK = 64
_MASK_FUNCTIONS = (("nablaT_v2", False), ("nabla_block_mask", True))
"""Names of the functions that compute the mask in diffusers' modules, and whether their queries have the shape
`[batch, heads, tokens, _]` rather than `[batch, tokens, heads, _]`."""


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """The methods of a bound processor that replace `upstream`, the `__call__` of diffusers' processor."""
    bound = overlay.rebuild(upstream)
    name, heads_first = next(each for each in _MASK_FUNCTIONS if each[0] in bound.__globals__)
    return {"__call__": with_globals(bound, **{name: _mask_function(bound.__globals__[name], heads_first)})}


def _mask_function(upstream: Callable[..., Any], heads_first: bool) -> Callable[..., Any]:
    """The replacement of `upstream`, diffusers' function that computes the mask. Arguments are the same."""

    def mask(q: Tensor, k: Tensor, sta: Tensor, thr: float = 0.9) -> Any:
        query, key = (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)
        rows = _rows(query, key, sta, thr)
        return upstream(q, k, sta, thr) if rows is None else rows

    return mask


def _rows(query: Tensor, key: Tensor, near: Tensor, threshold: float) -> Any:
    """The mask of this rank's blocks of queries over all blocks of keys, as a `BlockRowMask`; None if nothing is split.

    Args:
        query, key: `[batch, tokens of this rank, heads, head_dim]`.
        near: the fixed pattern, bool, `[blocks of all queries, blocks of all keys]` in its last dimensions.
        threshold: share of each row's probabilities that is kept. The smallest ones, with a sum below one minus this,
            are left out.

    Raises:
        AttentionProviderError: a shard is not a multiple of 64 tokens, or `near` has another shape.
    """
    tracker = active.tracker
    split = None if tracker is None else tracker.attention(query.shape[1], key.shape[1])
    if tracker is None or split is None:
        return None
    from ..context_parallel.sequences.sharded_masks import BlockRowMask
    from ..context_parallel.sequences.sharding import gather

    lengths = split.queries.sizes + split.keys.sizes
    if any(length % BLOCK for length in lengths):
        raise AttentionProviderError(
            f"attention chooses among blocks of {BLOCK} tokens, but the ranks have {split.queries.sizes} queries and "
            f"{split.keys.sizes} keys. Split the sequence between blocks with advanced.CPBlocks(sequence, {BLOCK}) in "
            "the plan."
        )
    queries, keys = split.queries.in_blocks(BLOCK), split.keys.in_blocks(BLOCK)
    if near.shape[-2:] != (queries.total, keys.total):
        raise AttentionProviderError(
            f"the mask of near blocks has shape {list(near.shape)}; accepted is [..., {queries.total}, {keys.total}], "
            f"with the blocks of {BLOCK} tokens of all ranks' queries and keys. Do not split it in the plan."
        )
    mesh = tracker.mesh
    with torch.no_grad():  # the choice of blocks has no gradient
        of_queries, of_keys = (each.detach().unflatten(1, (-1, BLOCK)).mean(dim=2) for each in (query, key))
        of_keys = gather(of_keys, keys, 1, mesh)
        scores = of_queries.transpose(1, 2) @ of_keys.permute(0, 2, 3, 1)
        least, order = (scores * query.shape[-1] ** -0.5).softmax(dim=-1).sort(dim=-1)
        heavy = least.cumsum(dim=-1) >= 1 - threshold
        seen = torch.zeros_like(heavy).scatter(-1, order, heavy)
        start, count = queries.spans[mesh.rank][0]
        return BlockRowMask(seen | near.narrow(-2, start, count).bool(), BLOCK)
