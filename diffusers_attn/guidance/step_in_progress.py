"""A step while its calls are computed, and the exchange of their outputs between groups of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nested import mapped, tensors_in
from .batch import Batch
from .branches import GuidedStep
from .division import Division
from .groups import Groups
from .inputs import Arguments
from .pending import Arrival, PendingTensor


class StepInProgress:
    """How the calls of one step are computed.

    Args:
        step: the step.
        batch: the samples of each call.
        division: among how many groups the step is divided.
        branches: number of calls that it should have.
    """

    def __init__(self, step: GuidedStep, batch: Batch, division: Division, branches: int) -> None:
        self.step = step
        self.batch = batch
        self.division = division
        self.branches = branches
        self.groups: Groups | None = None
        """Groups that compute different branches; None: all ranks compute each call together."""
        self.alone: Groups | None = None
        """Groups that each compute all of an unknown step, without an exchange."""
        self.arrival: Arrival | None = None
        self.outputs: list[Output] = []
        """Outputs that were not exchanged yet."""


class Output(NamedTuple):
    """The output of one call of a step."""

    number: int
    """Number of the call in its step."""
    given: Arguments
    """Arguments of the call on this rank."""
    is_exchanged: bool
    """Whether ranks exchanged them before the call."""
    owner: int
    """Number, among the owners of a part of the batch, of the group that computes it."""
    expected: Any
    """The output, with tensors on "meta"."""
    parts: list[Any]
    """The part of the output for each part of the batch, with tensors on "meta"."""
    pending: list[PendingTensor]
    values: list[Tensor] | None
    """The values of this group's part, if the group is an owner; None otherwise."""


class _Slot:
    """A tensor to receive.

    Args:
        group: index of the group that computes it.
        like: a tensor of its shape and dtype.
        value: the value, in that group.
    """

    def __init__(self, group: int, like: Tensor, value: Tensor | None) -> None:
        self.group = group
        self.like = like
        self.value = value


def exchange_outputs(current: StepInProgress, groups: Groups, outputs: list[Output]) -> None:
    """Sets the values of pending tensors on all ranks."""
    slots: list[_Slot] = []
    for output in outputs:
        for part, nest in enumerate(output.parts):
            group = part * current.division.owners + output.owner
            found = tensors_in(nest)
            mine = output.values if group == groups.index and output.values is not None else [None] * len(found)
            slots += [_Slot(group, each, value) for each, value in zip(found, mine, strict=True)]
    device = next(each.device for output in outputs for each in output.pending)
    for dtype in dict.fromkeys(each.like.dtype for each in slots):
        ordered = sorted((each for each in slots if each.like.dtype == dtype), key=lambda each: each.group)
        own = [each.value.flatten() for each in ordered if each.value is not None]
        sizes = [sum(each.like.numel() for each in ordered if each.group == group) for group in range(groups.count)]
        rows = groups.gather(torch.cat(own) if own else torch.empty(0, dtype=dtype, device=device), sizes)
        for slot, value in zip(ordered, rows.split([each.like.numel() for each in ordered]), strict=True):
            slot.value = value.view(slot.like.shape)
    arrived = iter(slots)
    for output in outputs:
        parts = [mapped(nest, lambda _: next(arrived).value) for nest in output.parts]
        values = tensors_in(current.batch.merged(parts, output.expected))
        for pending, value in zip(output.pending, values, strict=True):
            pending.value = value
