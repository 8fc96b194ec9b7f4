"""The groups of ranks that compute different branches or samples, and the exchange between them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import spans
from ..context_parallel.comm import rank_progress
from ..context_parallel.mesh import ContextParallelMesh
from ..context_parallel.sequences import sharding


@dataclasses.dataclass(frozen=True)
class Groups:
    """Neighbouring ranks form a group. Its ranks split their sequences among themselves."""

    count: int
    """Number of groups."""
    mesh: ContextParallelMesh
    """The ranks of this rank's group."""
    everyone: ContextParallelMesh
    """The ranks of all groups."""
    members: tuple[int, ...]
    """Numbers of these ranks in the job."""

    @property
    def index(self) -> int:
        """Number of this rank's group."""
        return self.everyone.rank // self.mesh.size

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all groups, in their order. All ranks must call this.

        Args:
            rows: the rows of this rank's group, `[sizes[index], ...]`; equal on all of its ranks, of which the first
                sends them.
            sizes: number of rows of each group.
        """
        starts = [sum(sizes[:group]) for group in range(self.count)]
        rows_of_ranks = []
        for rank in range(self.everyone.size):
            group, place = divmod(rank, self.mesh.size)
            rows_of_ranks.append(((starts[group], 0 if place else sizes[group]),))
        mine = rows if self.everyone.rank % self.mesh.size == 0 else rows[:0]
        name = spans.span(spans.EXCHANGE, spans.BETWEEN_GROUPS) if spans.is_on() else contextlib.nullcontext()
        with rank_progress.waiting_for(self.members), torch.no_grad(), name:
            return sharding.gather(mine, sharding.Shards(tuple(rows_of_ranks)), 0, self.everyone)
