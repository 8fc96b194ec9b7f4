"""SmoothedEnergyGuidance: queries are gathered before they are blurred as a picture, and split again.

Private names of diffusers in this file: `fn_ref` of the hook and its `post_forward`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ....errors import AttentionProviderError
from ...sequences import sharding
from ...sequences.find_by_length import check_lengths_suffice, find_by_length, joins
from ...sequences.tracker import SequenceTracker
from .replacing import replace

BLUR = "post_forward"


def adapt(hook: Any, tracker: SequenceTracker) -> None:
    """Replaces the blur of a `SmoothedEnergyGuidanceHook`."""
    replace(hook, hook.fn_ref, BLUR, functools.partial(_blur, hook, tracker))


def _blur(hook: Any, tracker: SequenceTracker, module: nn.Module, queries: Tensor) -> Any:
    """`queries` are `[batch, seq, channels]`, from a module's projection."""
    if not tracker.is_split or (tracker.role is not None and not tracker.role.query):
        return hook.post_forward(module, queries)
    shards, group = _shards_of_queries(queries.shape[1], tracker)
    queries = queries.unflatten(1, (-1, group))
    full = sharding.gather(queries, shards, 1, tracker.mesh).flatten(1, 2).contiguous()
    full = hook.post_forward(module, full).unflatten(1, (-1, group))
    return sharding.take(full, shards.spans[tracker.mesh.rank], 1).flatten(1, 2).contiguous()


def _shards_of_queries(length: int, tracker: SequenceTracker) -> tuple[sharding.Shards, int]:
    """The shards of a projection with `length` tokens, among the sequences of its attention module's queries; and the
    number of tokens in each entry of the sequence.

    Raises:
        AttentionProviderError: the length fits none of them.
    """
    what = "the queries that SmoothedEnergyGuidance blurs"
    check_lengths_suffice(tracker, what)
    names = tuple(tracker.lengths) if tracker.role is None else tracker.present(tracker.role.query)
    shards = find_by_length(tracker, length, joins(names), what)
    if shards is not None:
        return shards, 1
    local = tracker.local_length(names)
    if len(names) == 1 and local and length % local == 0:
        return tracker.shards(names), length // local
    raise AttentionProviderError(
        f"{what} have {length} tokens on rank {tracker.mesh.rank}, as none of the sequences of its attention has "
        f"({tracker.describe()}). Leave SmoothedEnergyGuidance out, or run on one device."
    )
