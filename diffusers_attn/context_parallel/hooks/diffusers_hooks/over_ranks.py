"""Sums over the ranks, each of which contributes its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...comm.group import Group
from ...sequences.find_by_length import joins
from ...sequences.tracker import SequenceTracker


def sum_over_ranks(numbers: Tensor, tracker: SequenceTracker) -> Tensor:
    """The sums of all ranks' numbers, on every rank."""
    for group in (tracker.mesh.ring, tracker.mesh.ulysses):
        numbers = _all_reduce(numbers, group)
    return numbers


def _all_reduce(numbers: Tensor, group: Group) -> Tensor:
    if group.size == 1:
        return numbers
    reduced = torch.ops._c10d_functional.all_reduce(numbers, "sum", group.name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def own_tokens(tensor: Tensor, tracker: SequenceTracker, dim: int) -> Tensor | None:
    """`tensor` without tokens that other ranks have as well. None if the length does not tell which these are.

    Args:
        dim: the dimension of the tokens.
    """
    names = tuple(tracker.lengths)
    if not any(tracker.kept((name,)) for name in names):
        return tensor
    found = {tracker.kept(join) for join in joins(names) if tracker.local_length(join) == tensor.shape[dim]}
    if len(found) != 1:
        return None
    (kept,) = found
    return tensor if kept is None else kept.take_out(tensor, dim)


def token_dim(tensor: Tensor) -> int:
    """The dimension of the tokens in a block's output, `[batch, tokens, channels]` or `[tokens, channels]`."""
    return max(tensor.ndim - 2, 0)
