"""The entry of an attention call in a model whose tokens are split: local, over the ranks, or refused.

Dispatch calls it before it serves a call itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import masks, shapes, tensor_kinds
from ...call import AttentionCall
from ...errors import AttentionProviderError
from ..mesh import ContextParallelMesh
from ..sequences.placeholders import LocalTokens
from ..sequences.roles import SplitCall
from ..sequences.sharded_masks import (
    BlockRowMask,
    KeyMask,
    OuterMask,
    RectangleMask,
    RowMask,
    ShardedMask,
    sharded_mask,
)
from ..sequences.sharding import take
from ..sequences.tracker import SequenceTracker
from .parallel_attention import parallel_attention
from .partial_kernel import options_by_place

_BY_PLACES = (BlockRowMask, RectangleMask)
"""Mask types with positions in the full sequences of all ranks."""


def split_attention(
    given: AttentionCall, tracker: SequenceTracker, mesh: ContextParallelMesh | None = None
) -> Tensor | None:
    """Attention over the ranks of a mesh, or None if each rank serves the call by itself.

    Args:
        given: a call with this rank's queries. Its keys are this rank's or all; its mask is over the local keys or all
            keys.
        tracker: the sequences of the model that makes the call.
        mesh: a mesh with the groups of `tracker.mesh` and its own settings; None uses `tracker.mesh`.

    Returns:
        The output for this rank's queries, in the layout of the call; or None.

    Raises:
        AttentionProviderError: context parallelism does not serve the call exactly. Nothing has been sent.
    """
    mesh = tracker.mesh if mesh is None else mesh
    if (mesh.ring, mesh.ulysses) != (tracker.mesh.ring, tracker.mesh.ulysses):
        raise AttentionProviderError(
            f"the scope's mesh has {mesh.ring.size} (ring) by {mesh.ulysses.size} (ulysses) ranks, but the model's "
            f"tokens are split over {tracker.mesh.ring.size} by {tracker.mesh.ulysses.size}. Pass the same mesh to "
            "attention_provider and apply_context_parallel."
        )
    given.check()
    call = given.four_dims().broadcast().in_layout("bshd")
    out = _split(call, tracker, mesh)
    if out is None or given.layout == "bshd":
        return out
    out = out.transpose(1, 2)
    return out if given.has_four_dims else shapes.as_given(out, given.query, given.key, given.value)


def _split(call: AttentionCall, tracker: SequenceTracker, mesh: ContextParallelMesh) -> Tensor | None:
    """`split_attention` for a call with tensors `[batch, seq, heads, head_dim]`."""
    if tracker.role is not None and tracker.role.key and tracker.is_split:
        _check_tensor(call.mask)  # before the lengths, which some models pad to whole blocks
    query_len, key_len = call.query.shape[1], call.key.shape[1]
    shards = tracker.attention(query_len, key_len)
    by_place = options_by_place(call.provider, call.options) if call.options else ()
    if call.is_causal:
        by_place += ("is_causal=True",)
    if shards is None:
        if by_place and tracker.splits_queries(query_len, key_len):
            raise AttentionProviderError(
                f"{', '.join(by_place)} counts positions, but this rank has only its shard of {query_len} queries "
                f"and all keys ({tracker.describe()}). Leave it out, or run this model on one device."
            )
        return None
    if call.derived and call.not_plain is not None:
        raise tensor_kinds.refused(
            *call.not_plain, "and the tokens of this call are split over ranks",
            "compute such derivatives on one device, or with autograd's backward",
        )  # fmt: skip
    _check_tensor(call.mask)
    if call.dropout_p > 0.0:
        raise AttentionProviderError(
            f"dropout_p={call.dropout_p}: over several ranks only 0 is accepted, since the ranks share no random state "
            "and the dropped weights would depend on the split. Set dropout to 0, or disable context parallelism."
        )
    if isinstance(call.mask, Tensor):
        _check_broadcasts(call.mask, call.query)
    role = tracker.role
    kept: tuple[LocalTokens | None, LocalTokens | None] = (None, None)
    if role is not None:
        query_names, key_names = tracker.present(role.query), tracker.present(role.key)
        prefix = 0 if role.prefix is None else shards.keys.total - tracker.shards(key_names).total
        kept = tracker.kept(query_names), tracker.kept(key_names, prefix)
    mask = None if call.mask is None else _mask(call.mask, shards, tracker, *kept)
    of_all_keys = isinstance(call.mask, _BY_PLACES) or (
        call.mask is not None and call.mask.shape[-1] == shards.keys.total
    )
    if not shards.in_order and (by_place or of_all_keys):
        what = " and ".join([*by_place, "a mask over all of them"] if of_all_keys else by_place)
        raise AttentionProviderError(
            f"several sequences are joined in this call, and {what} needs their order. Give "
            'it in the plan: "path.of.the.attention": CPAttention(("text", "image")).'
        )
    out = parallel_attention(
        _without(call.query, kept[0], 1),
        _without(call.key, kept[1], 1),
        _without(call.value, kept[1], 1),
        mask,
        mesh=mesh,
        query_shards=shards.queries,
        key_shards=shards.keys,
        provider=call.provider,
        options=call.options,
        is_causal=call.is_causal,
        scale=call.scale,
        transport=tracker.transport.kind,
    )
    return out if kept[0] is None else kept[0].put_back(out, 1)


def _without(tensor: Tensor, kept: LocalTokens | None, dim: int) -> Tensor:
    """`tensor` without placeholder tokens. Most calls have none."""
    return tensor if kept is None else kept.take_out(tensor, dim)


def _check_broadcasts(mask: Tensor, query: Tensor) -> None:
    """Raises AttentionProviderError for a dtype, batch size or number of heads that one device refuses too."""
    masks.check_dtype(mask)
    batch, heads = query.shape[0], query.shape[2]
    of_batch = mask.shape[0] if mask.ndim == 4 else 1
    of_heads = mask.shape[-3] if mask.ndim > 2 else 1
    if not 1 <= mask.ndim <= 4 or of_batch not in (1, batch) or of_heads not in (1, heads):
        raise AttentionProviderError(
            f"attn_mask has shape {list(mask.shape)}, which does not broadcast to [batch, heads, queries, keys] with a "
            f"batch of {batch} and {heads} heads."
        )


def _check_tensor(mask: Any) -> None:
    if mask is not None and not isinstance(mask, (Tensor, *_BY_PLACES)):
        raise AttentionProviderError(
            f"attn_mask is a {type(mask).__name__}; over several ranks a torch.Tensor is accepted. A BlockMask counts "
            "positions of the full sequence: run this model on one device, or give it a processor that makes none."
        )


def _mask(
    mask: Any, call: SplitCall, tracker: SequenceTracker, query_kept: LocalTokens | None, key_kept: LocalTokens | None
) -> ShardedMask:
    if isinstance(mask, _BY_PLACES):
        return mask
    given = tuple(mask.shape)
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    for dim in (1, 2):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:  # made by expand: equal for all heads or queries
            mask = mask.narrow(dim, 0, 1)
    if tracker.role is not None and tracker.role.outer_mask:
        # The diagonal holds the square of each token's value, which for True, False, one and zero is the value.
        tokens = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return OuterMask(_without(tokens, query_kept, 1), _without(tokens, key_kept, 1))
    if tracker.role is not None and tracker.role.key_mask:
        return KeyMask(_own_keys(mask, call, tracker.mesh.rank))
    if tracker.role is not None and tracker.role.row_mask:
        return RowMask(_rows(_without(mask, query_kept, 2), call, tracker.mesh.rank))
    if query_kept is not None and mask.shape[2] == query_kept.seen > 1:
        mask = query_kept.take_out(mask, 2)
    if key_kept is not None and mask.shape[-1] == key_kept.seen:
        mask = key_kept.take_out(mask, -1)
    return sharded_mask(mask, call.queries, call.keys, tracker.mesh.rank, given)


def _own_keys(mask: Tensor, call: SplitCall, rank: int) -> Tensor:
    """The single row of one head, over the local keys. Raises AttentionProviderError if it does not cover all keys."""
    if mask.shape[2] != 1 or mask.shape[-1] < call.keys.total:
        raise AttentionProviderError(
            f"attn_mask has shape {list(mask.shape)} on rank {rank}; by its plan it has one row, with columns "
            f"for all {call.keys.total} keys. Do not split the mask, or describe it differently in CPAttention."
        )
    return take(mask[:, 0, 0], call.keys.spans[rank], dim=1)


def _rows(mask: Tensor, call: SplitCall, rank: int) -> Tensor:
    """The rows of one head, over all keys. Raises AttentionProviderError if they do not match the local queries."""
    queries, keys = call.queries.sizes[rank], call.keys.total
    if mask.shape[2] != queries or mask.shape[-1] < keys:
        raise AttentionProviderError(
            f"attn_mask has shape {list(mask.shape)} on rank {rank}; according to its plan it has rows for this rank's "
            f"{queries} queries and columns for all {keys} keys. Split only the rows of the mask."
        )
    return mask[:, :1, :, :keys]
