"""Caches of keys and values: what a model stores of split sequences is gathered first.

A later forward splits other sequences, and may run with other lengths: of a cache that every rank has whole it needs to
know nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ...cp_plans.advanced import CPStore
from ..sequences.tracker import SequenceTracker


class GatheringStore:
    """Stands for a cache while a module runs; all but what it is given to store goes to the cache itself."""

    def __init__(self, store: Any, spec: CPStore, tracker: SequenceTracker) -> None:
        self._store, self._spec, self._tracker = store, spec, tracker

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return functools.partial(self._gathered, found) if name == self._spec.method else found

    def _gathered(self, store: Any, *tensors: Tensor) -> Any:
        spec = self._spec
        return store(*[self._tracker.gather(spec.sequence, tensor, spec.gather_dim) for tensor in tensors])
