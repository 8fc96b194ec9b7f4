"""Recognises the steps of a pipeline: which calls of a model are branches of the same step.

Branches of a step get the same latents, as the same tensor object, one call after the other. How many there are is
known from the step before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class StepKind:
    """What earlier steps with latents of one shape have shown."""

    def __init__(self) -> None:
        self.branches: int | None = None
        """Number of calls in the latest such step; None before the first has ended."""
        self.most_branches = 1
        """The largest number of calls in a step so far."""
        self.one_by_one = False
        """Whether a pipeline needs the output of one call before it makes the next."""
        self.outputs: dict[Any, Any] = {}
        """The output of each branch, with tensors on "meta", by number of the branch and plain arguments."""


class GuidedStep:
    """One step: calls of a model with the same latents.

    Args:
        latents: the first argument of the first call.
        kind: what earlier steps have shown.
    """

    def __init__(self, latents: Any, kind: StepKind) -> None:
        self._latents = [(weakref.ref(each), version_of(each)) for each in _tensors(latents)]
        self.kind = kind
        self.calls = 0
        """Number of calls so far."""
        self.was_interrupted = False
        """Whether outputs were needed before the last call."""

    def continues_with(self, latents: Any) -> bool:
        """Whether a call with these latents is a branch of this step."""
        found = _tensors(latents)
        return len(found) == len(self._latents) > 0 and all(
            then() is now and version == version_of(now) for now, (then, version) in zip(found, self._latents)
        )

    def end(self) -> None:
        """Notes the number of branches, from which the next step is planned."""
        self.kind.branches = self.calls
        self.kind.most_branches = max(self.kind.most_branches, self.calls)
        self.kind.one_by_one |= self.was_interrupted


def shape_of(latents: Any) -> Any:
    """Hashable description of the latents' shapes and dtypes."""
    return tuple((tuple(each.shape), each.dtype, each.device) for each in _tensors(latents))


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place changes of a tensor; None for an inference tensor, which has no such number."""
    return None if tensor.is_inference() else tensor._version


def _tensors(latents: Any) -> list[Tensor]:
    if isinstance(latents, (list, tuple)):
        return [each for each in latents if isinstance(each, torch.Tensor)]
    return [latents] if isinstance(latents, torch.Tensor) else []
