"""`CPStore`: gathers the keys and values that a model stores for later forwards.

A later forward splits other sequences, perhaps of other lengths. It can read such a cache because every rank has all of
it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....cp_plans.advanced import CPStore
from ...sequences.tracker import SequenceTracker
from .base import ArgumentHook


class ReplaceStore(ArgumentHook):
    """Gives the module a `GatheringStore` in place of the store."""

    def change(self, value: Any, what: str, outputs: Sequence[Any]) -> Any:
        return GatheringStore(value, self.spec, self.tracker)


class GatheringStore:
    """A store whose one method gathers tensors before it stores them. Everything else is that of the wrapped store."""

    def __init__(self, store: Any, spec: CPStore, tracker: SequenceTracker) -> None:
        self._store, self._spec, self._tracker = store, spec, tracker

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return functools.partial(self._gathered, found) if name == self._spec.method else found

    def _gathered(self, store: Any, *tensors: Tensor) -> Any:
        spec = self._spec
        return store(*[self._tracker.gather(spec.sequence, tensor, spec.gather_dim) for tensor in tensors])
