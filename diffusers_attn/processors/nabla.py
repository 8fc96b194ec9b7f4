"""NABLA, the block-sparse attention of Kandinsky 5 and 6 SR, where several ranks share the sequence.

A layer takes the means of its queries and keys over blocks of 64 tokens, and by the products of these chooses which
blocks of keys a block of queries sees; a fixed pattern of near blocks is added. diffusers' processors make this choice
in a function of their module, from all queries and keys. Over several ranks they call the one here in its place: it
gathers the means of the keys, a 64th of what the keys are, and makes the rows of this rank's queries. All else is
diffusers' own code, and on one device that function too.
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
"""The function of each processor's module that makes the mask, and whether its queries are `[batch, heads, tokens, _]`
rather than `[batch, tokens, heads, _]`."""


def methods(upstream: FunctionType, overlay: Overlay) -> dict[str, Callable[..., Any]]:
    """What a bound processor has in place of `upstream`, the `__call__` of diffusers' processor."""
    bound = overlay.rebuild(upstream)
    name, heads_first = next(each for each in _MASK_FUNCTIONS if each[0] in bound.__globals__)
    return {"__call__": with_globals(bound, **{name: _instead(bound.__globals__[name], heads_first)})}


def _instead(upstream: Callable[..., Any], heads_first: bool) -> Callable[..., Any]:
    """In place of the function by which diffusers' processor makes its mask, with the same arguments."""

    def mask(q: Tensor, k: Tensor, sta: Tensor, thr: float = 0.9) -> Any:
        query, key = (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)
        rows = _rows(query, key, sta, thr)
        return upstream(q, k, sta, thr) if rows is None else rows

    return mask


def _rows(query: Tensor, key: Tensor, near: Tensor, threshold: float) -> Any:
    """The blocks of all keys that this rank's blocks of queries see, as a `BlockRowMask`; None where nothing is split.

    Args:
        query, key: `[batch, tokens of this rank, heads, head_dim]`.
        near: bool, `[blocks of all queries, blocks of all keys]` in its last dimensions: those that are always seen.
        threshold: of each row's probabilities, the least that add up to less than one minus this are left out.
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
            f"attention chooses among blocks of {BLOCK} tokens, and the ranks hold {split.queries.sizes} queries and "
            f"{split.keys.sizes} keys. Split the sequence between blocks: "
            f"advanced.CPBlocks(sequence, {BLOCK}) in its plan."
        )
    queries, keys = split.queries.in_blocks(BLOCK), split.keys.in_blocks(BLOCK)
    if near.shape[-2:] != (queries.total, keys.total):
        raise AttentionProviderError(
            f"the mask of near blocks has shape {list(near.shape)}; accepted is [..., {queries.total}, {keys.total}], "
            f"for the blocks of {BLOCK} tokens that all ranks' queries and keys have. Leave it whole."
        )
    mesh = tracker.mesh
    with torch.no_grad():  # what is seen is a choice, which has no gradient
        of_queries, of_keys = (each.detach().unflatten(1, (-1, BLOCK)).mean(dim=2) for each in (query, key))
        of_keys = gather(of_keys, keys, 1, mesh)
        scores = of_queries.transpose(1, 2) @ of_keys.permute(0, 2, 3, 1)
        least, order = (scores * query.shape[-1] ** -0.5).softmax(dim=-1).sort(dim=-1)
        heavy = least.cumsum(dim=-1) >= 1 - threshold
        seen = torch.zeros_like(heavy).scatter(-1, order, heavy)
        start, count = queries.spans[mesh.rank][0]
        return BlockRowMask(seen | near.narrow(-2, start, count).bool(), BLOCK)
