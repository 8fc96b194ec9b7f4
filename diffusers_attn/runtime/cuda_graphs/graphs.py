"""The recordings of each model, and which models have any."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .recording import Pool, Recording
from .snapshot import Snapshot

logger = logging.getLogger(__name__)
_CHANGES = 8
"""Under "auto", a model that changes so many times without a replay in between is not recorded any more."""

Agree = Callable[[str | None], Sequence[str | None]]
"""Gives this rank's reason against a recording (None: there is none) to all ranks of a sequence, and returns those of
all."""
CallKind = tuple[Any, ...]
"""A kind of call: the mesh over which it is split, and all else that a recording depends on. Hashable."""


class NotRecorded(NamedTuple):
    """A kind of call that runs as usual, under "auto"."""

    reason: str


class Graphs:
    """The recordings of one model. Holds no reference to the model, which would keep it alive.

    Args:
        device: the model's device.
        max_graphs: number of kinds of calls to keep.
        agree: None for the policy "always".
    """

    def __init__(self, device: torch.device, max_graphs: int, agree: Agree | None) -> None:
        self.device = device
        self.max_graphs = max_graphs
        self.agree = agree
        self.by_ranks = False
        """Whether they end with context parallelism."""
        self.pool: Pool | None = None
        self.snapshot: Snapshot | None = None
        self.recordings: OrderedDict[CallKind, Recording | NotRecorded | None] = OrderedDict()
        """By kind of call, most recently used last; None for a kind that has run only once."""
        self.replays = 0
        """Number of calls that were replays."""
        self.changes = 0
        """Number of changes of the model since the last replay."""
        self.is_checked = False
        """Whether the call that begins now was checked before, by `GraphedForward.standing`."""
        self.off: str | None = None
        """Under "auto", why no call is recorded any more."""
        self.lock = threading.RLock()

    @property
    def is_automatic(self) -> bool:
        return self.agree is not None

    @property
    def pool_mib(self) -> int:
        """Memory of the recordings in MiB."""
        return 0 if self.pool is None else self.pool.nbytes // 2**20

    @property
    def recorded(self) -> int:
        """Number of kinds of calls with a graph."""
        return sum(not isinstance(each, NotRecorded | None) for each in self.recordings.values())

    def check(self) -> None:
        """Drops all graphs if the model has changed since they were recorded."""
        is_checked, self.is_checked = self.is_checked, False
        if is_checked or self.snapshot is None or self.snapshot.holds():
            return
        self.clear()
        self.changes += 1
        if self.is_automatic and self.changes >= _CHANGES:
            self.off = "it changes between its calls"

    def clear(self) -> None:
        """Drops all graphs."""
        self.recordings.clear()
        self.snapshot = None
        self.is_checked = False

    def make_room(self, model: str, mesh: object) -> None:
        """Drops graphs of calls over `mesh` that are too many, the least recently used first. All of its ranks do."""
        while len(kinds := [kind for kind in self.recordings if kind[0] == mesh]) > self.max_graphs:
            del self.recordings[kinds[0]]
            logger.log(
                logging.INFO if self.is_automatic else logging.WARNING,
                "%s was called in more than %d ways (shapes, or arguments that are no tensors), and the CUDA graph of "
                "one of them was dropped. If it comes again it is recorded again, which takes longer than a step: give "
                "numbers that change in every step as tensors, or apply_cuda_graphs(model, max_graphs=...) more.",
                model,
                self.max_graphs,
            )


applied: weakref.WeakKeyDictionary[nn.Module, Graphs] = weakref.WeakKeyDictionary()
"""The models whose forward is a `GraphedForward`."""
reasons_to_pause: list[str] = []
"""Reasons for which all models run without graphs now."""


@contextlib.contextmanager
def paused(reason: str) -> Iterator[None]:
    """Runs all models without their graphs, which stay. Ranks that share a sequence must do so together."""
    reasons_to_pause.append(reason)
    try:
        yield
    finally:
        reasons_to_pause.remove(reason)


def drop_all() -> None:
    """Drops the graphs of all models. They are recorded again as calls come."""
    for graphs in list(applied.values()):
        graphs.clear()
