"""The forwards of a model, counted: so that a rank that skips one, or has failed in one and goes on, is not taken to be
in step with the others.

An operator in a compiled graph is given plain values, and finds these by a token.
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
"""what an entry is named that tells which forward this is."""


class State(NamedTuple):
    """What all ranks must have alike when a forward begins, besides its inputs."""

    at: str
    """which forward it is, in words."""
    adapters: dict[str, str]
    """of the model, and its processors, by name."""
    digest: str
    """of `adapters`."""


def digest_of(said: dict[str, str]) -> str:
    """The same text on ranks that say the same."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


class Forwards:
    """Those of one model since it was enabled. Holds no reference to it.

    Args:
        name: of the model, for messages; the same on all ranks.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.token = next(_tokens)
        self._count = 0
        self._model = weakref.ref(model)
        self._adapters = Adapters(model)
        self._said: dict[str, str] = {}
        self._digest = digest_of(self._said)
        _by_token[self.token] = self

    @property
    def model(self) -> Any:
        return self._model()

    def begin(self, in_training: bool) -> State:
        """The next one begins.

        Args:
            in_training: whether gradients are recorded, and weights therefore expected to change.
        """
        adapters = self._adapters.said(in_training)
        if adapters is not self._said:  # which stays the same object until something changes
            self._said, self._digest = adapters, digest_of(adapters)
        return State(self.count(), adapters, self._digest)

    def count(self) -> str:
        """Which one begins, in words. Notes that this rank is there."""
        self._count += 1
        at = self.latest()
        rank_progress.note_begin(at)
        return at

    def latest(self) -> str:
        """Which one was the last to begin, in words."""
        return f"forward {self._count} of {self.name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_tokens = itertools.count(1)
_by_token: weakref.WeakValueDictionary[int, Forwards] = weakref.WeakValueDictionary()


def forwards_of(token: int) -> Forwards:
    """Those that have this token. Raises AttentionProviderError where there are none in this process."""
    found = _by_token.get(token)
    if found is None:
        raise AttentionProviderError(
            "context parallelism was disabled for the model whose forward this is, or it was copied or loaded from one "
            "that had it. Call enable_context_parallel on it, on all ranks."
        )
    return found


class NoteForward:
    """A forward pre-hook that notes where this rank is, for models whose ranks compare nothing."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.forwards.count()
