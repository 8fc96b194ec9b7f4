"""The processes that share a piece of work, as little of them as is needed: so a cache can be filled by one process,
by threads, or by the ranks of a job, and knows nothing of how they talk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")


class Ranks(Protocol):
    """Processes that do the same work together, each its share."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def barrier(self) -> None:
        """Waits until all have come here."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any of them says True; all must ask."""
        ...


class OneRank:
    """A process by itself."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def any(self, flag: bool) -> bool:
        return flag


class GroupRanks:
    """The ranks of a process group.

    Args:
        group: of torch.distributed; None is all ranks of the job.
        device: where the group's backend takes tensors from, as "cuda" for NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        import torch.distributed as dist

        self._group, self._device = group, device
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def barrier(self) -> None:
        self.any(False)

    def any(self, flag: bool) -> bool:
        import torch
        import torch.distributed as dist

        flags = torch.tensor([int(flag)], device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags.item())


class OtherRankError(RuntimeError):
    """Work that was shared has failed on another process, whose own error says why."""


def in_step(ranks: Ranks, shares: Iterable[T], do: Callable[[T], None], what: str) -> None:
    """Calls `do` for each of this rank's `shares`, one for every call on the other ranks.

    The ranks meet after every one, so that none waits for the others longer than one takes (process groups give up
    after minutes), and an error on one ends the work of all.

    Args:
        ranks: those that work together; each with shares of its own.
        shares: this rank's.
        do: the work.
        what: names the work, for the error on other ranks.

    Raises:
        OtherRankError: it failed on another rank. What `do` raises here goes on, after the others know.
    """
    own: Iterator[T] = iter(shares)
    while True:
        failed: Exception | None = None
        done = False
        try:
            do(next(own))
        except StopIteration:
            done = True
        except Exception as error:
            failed = error
        if ranks.any(failed is not None):
            raise failed or OtherRankError(f"{what} failed on another process; see its message.")
        if not ranks.any(not done):
            return
