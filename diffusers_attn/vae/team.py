"""The ranks that compute one VAE together, and gathering over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.comm import rank_progress
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.process_groups import all_gather, resolve


class Team(NamedTuple):
    """Ranks that hold parts of the same tensors. With fewer rows than ranks, the last ranks repeat the work of the last
    shard, so that all of them make the same exchanges."""

    axes: tuple[Group, ...]
    """Groups of ranks; the number of a rank counts along the last group first."""
    shards: int
    """Number of different shards."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        size = 1
        for axis in self.axes:
            size *= axis.size
        return size

    @property
    def rank(self) -> int:
        """Number of this rank."""
        rank = 0
        for axis in self.axes:
            rank = rank * axis.size + axis.rank
        return rank

    @property
    def shard(self) -> int:
        """Number of this rank's shard."""
        return min(self.rank, self.shards - 1)

    def start_gather(self, tensor: Tensor) -> Gathering:
        """Starts to gather `tensor`, whose shape is equal on all ranks.

        Not a functional collective: it takes twice as long on the host, and a frame of Wan has 36 gathers.
        """
        sent, arriving = tensor.contiguous().view(-1), None
        for axis in reversed(self.axes):
            if arriving is not None:
                sent = arriving.wait()
            arriving = _Arriving.start(sent, axis)
        assert arriving is not None
        return Gathering(arriving, (self.size, *tensor.shape), self.shards)

    def gather(self, tensor: Tensor) -> Tensor:
        """`tensor` of every shard, `[shards, ...]`."""
        return self.start_gather(tensor).wait()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all shards in the same order on all ranks, computed in float32 at least if not of integers."""
        wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        return self.gather(tensor).sum(0, dtype=wide).to(tensor.dtype)

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's values of `tensor`, which has the same shape on all ranks."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        for axis in self.axes:
            group = resolve(axis.name)
            try:
                dist.broadcast(tensor, group=group, group_src=0)
            except RuntimeError as error:
                raise rank_progress.explained(error, axis.name) from error
        return tensor


class Gathering(NamedTuple):
    """A gather that may still be in flight."""

    arriving: _Arriving
    shape: tuple[int, ...]
    """Shape of the result, with all ranks."""
    shards: int

    def wait(self) -> Tensor:
        """The gathered tensor, `[shards, ...]`. On a GPU, the current stream waits, not the host."""
        return self.arriving.wait().view(self.shape)[: self.shards]


class _Arriving(NamedTuple):
    """A gather over one group."""

    sent: Tensor
    """Lives until the gather is done."""
    gathered: Tensor
    work: Any
    axis: Group

    @staticmethod
    def start(sent: Tensor, axis: Group) -> _Arriving:
        """Starts to gather a flat tensor."""
        gathered = sent.new_empty(axis.size * sent.numel())
        try:
            work = all_gather(gathered, sent, group=resolve(axis.name), async_op=True)
        except RuntimeError as error:
            raise rank_progress.explained(error, axis.name) from error
        return _Arriving(sent, gathered, work, axis)

    def wait(self) -> Tensor:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise rank_progress.explained(error, self.axis.name) from error
        return self.gathered
