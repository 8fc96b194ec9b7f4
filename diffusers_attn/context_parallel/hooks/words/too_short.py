"""Errors for a dimension that is too short to split. Most often the sequence is in another dimension.

Models change after their plans were written. If a tensor `[batch, 1, seq, channels]` becomes
`[batch, seq, 1, channels]`, a plan that splits dimension 2 leaves all but one rank with nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ....cp_plans.plan import CPInput

if TYPE_CHECKING:
    from ...sequences.tracker import SequenceTracker


def has_entries(tensor: Tensor, dim: int, ranks: int) -> bool:
    """Whether `tensor` has a dimension `dim` with an entry for every rank."""
    return -tensor.ndim <= dim < tensor.ndim and tensor.shape[dim] >= ranks


def problem_of(
    tensor: Tensor, spec: CPInput, entry: str, tracker: SequenceTracker, outputs: Sequence[Any] = ()
) -> str | None:
    """The message of an error about splitting `tensor`; None if it can be split. All ranks find the same, since the
    tensor is the same on all of them.

    Args:
        tensor: has fewer entries in `spec.split_dim` than there are ranks, or no such dimension.
        entry: name of the argument or output: "output number 0 of 'rope'".
        outputs: all outputs of the module, if `tensor` is one. Others of its shape need words in the plan too.
    """
    name = spec.sequence
    if isinstance(name, tuple) or spec.flattened or spec.grouped or spec.split_already:
        return None  # `SequenceTracker.split` checks these lengths
    known = None if name is None else tracker.lengths.get(name)
    if not -tensor.ndim <= spec.split_dim < tensor.ndim:
        fits = _advice(spec, _dimension_that_fits(tensor, -1, known, tracker), tensor, tracker)
        return (
            f"the plan splits {entry} along dimension {spec.split_dim}, and it has {tensor.ndim} dimensions: its shape "
            f"is {list(tensor.shape)}. {fits}."
        )
    dim, size = spec.split_dim % tensor.ndim, tensor.shape[spec.split_dim]
    if known == size or (known is None and (size != 1 or name in tracker.named)):
        return None
    of_sequence = "" if known is None else f", and '{name}' has {known}"
    entries = f"{size} {'entry' if size == 1 else 'entries'} for {tracker.mesh.size} ranks"
    start = f"the plan splits {entry} along dimension {dim}, which has {entries}{of_sequence}: its shape is "
    instead = _advice(spec, _dimension_that_fits(tensor, dim, known, tracker), tensor, tracker)
    alike = [
        f"output number {number}"
        for number, each in enumerate(outputs)
        if each is not tensor and isinstance(each, Tensor) and each.shape == tensor.shape
    ]
    also = f" The module also gives {' and '.join(alike)} of this shape: give each an entry like it." if alike else ""
    return f"{start}{list(tensor.shape)}. {instead}.{also}"


def _dimension_that_fits(tensor: Tensor, dim: int, known: int | None, tracker: SequenceTracker) -> int | None:
    """The dimension that is as long as the sequence. If its length is not known, one that is as long as any sequence.
    Otherwise the longest, without the batch and, in three dimensions or more, the channels."""
    others = [each for each in range(tensor.ndim) if each != dim]
    if known is not None:
        return next((each for each in others if tensor.shape[each] == known), None)
    long = [each for each in others if tensor.shape[each] >= tracker.mesh.size]
    inner = [each for each in long if each > 0 and (tensor.ndim < 3 or each < tensor.ndim - 1)]
    alike = [each for each in inner if tensor.shape[each] in tracker.lengths.values()]
    longest = None
    for each in alike or inner:  # spelled out, so that Dynamo can follow it to the error
        if longest is None or tensor.shape[each] > tensor.shape[longest]:
            longest = each
    return longest


def _advice(spec: CPInput, fits: int | None, tensor: Tensor, tracker: SequenceTracker) -> str:
    if fits is None:
        return f"None of its dimensions can be split over {tracker.mesh.size} ranks: use fewer, or a longer sequence"
    return f"Dimension {fits}, with {tensor.shape[fits]} entries, fits: {_written(spec, fits)}"


def _written(spec: CPInput, dim: int) -> str:
    """`spec` with another dimension, as code."""
    parts = [str(dim)] if spec.expected_dims is None else [str(dim), str(spec.expected_dims)]
    for field in dataclasses.fields(spec)[2:]:
        if getattr(spec, field.name) != field.default:
            parts.append(f"{field.name}={getattr(spec, field.name)!r}")
    return f"CPInput({', '.join(parts)})"
