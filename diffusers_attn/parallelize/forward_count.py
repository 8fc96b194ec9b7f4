"""Counts the forwards of a model, so that ranks detect if one of them skipped a forward or continued after an error.

Operators in a compiled graph take only plain values, so they find a model's counter by an integer token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from ..context_parallel.comm import rank_progress
from ..errors import AttentionProviderError
from .model_sync import Adapters

CALL = "call"
"""Name of the entry that holds the number of the forward."""


class State(NamedTuple):
    """The state that must be equal on all ranks when a forward begins, in addition to its inputs."""

    at: str
    """The number of the forward, in words."""
    adapters: dict[str, str]
    """Descriptions of the model's adapters and processors, by name."""
    digest: str
    """Digest of `adapters`."""


def digest_of(descriptions: dict[str, str]) -> str:
    """A short digest, equal on ranks with equal descriptions."""
    return hashlib.blake2b(json.dumps(descriptions, sort_keys=True).encode(), digest_size=8).hexdigest()


class Forwards:
    """The forwards of one model since context parallelism was enabled. Holds no reference to the model.

    Args:
        model: the model.
        name: name of the model, for messages; the same on all ranks.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.token = next(_tokens)
        self._count = 0
        self._model = weakref.ref(model)
        self.adapters = Adapters(model)
        self._described: dict[str, str] = {}
        self._digest = digest_of(self._described)
        _by_token[self.token] = self

    @property
    def model(self) -> Any:
        return self._model()

    def begin(self, in_training: bool) -> State:
        """Counts a forward that begins, and describes the model.

        Args:
            in_training: whether gradients are recorded, so that weights may change in every step.
        """
        adapters = self.adapters.describe(in_training)
        if adapters is not self._described:  # the same object is returned until something changes
            self._described, self._digest = adapters, digest_of(adapters)
        return State(self.count(), adapters, self._digest)

    def count(self) -> str:
        """Counts a forward that begins, reports it as this rank's progress, and returns its number in words."""
        self._count += 1
        at = self.latest()
        rank_progress.note_begin(at)
        return at

    def latest(self) -> str:
        """The number of the latest forward, in words."""
        return f"forward {self._count} of {self.name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_tokens = itertools.count(1)
_by_token: weakref.WeakValueDictionary[int, Forwards] = weakref.WeakValueDictionary()


def forwards_of(token: int) -> Forwards:
    """The forwards with this token. Raises AttentionProviderError if this process has none."""
    found = _by_token.get(token)
    if found is None:
        raise AttentionProviderError(
            "this model's context parallelism was disabled, or the model is a copy of a split model. Call "
            "enable_context_parallel on it, on all ranks."
        )
    return found


class CountForward:
    """A forward pre-hook that counts forwards, for models with inputs="trust"."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.forwards.count()
