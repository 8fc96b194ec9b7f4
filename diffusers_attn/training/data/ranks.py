"""The interface through which processes share work: a cache can be filled by one process, threads or a job's ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")


class Ranks(Protocol):
    """Processes that divide work among them. Every method is collective."""

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def barrier(self) -> None:
        """Waits until all processes have called this."""
        ...

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is true on at least one process."""
        ...


class OneRank:
    """A single process."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Returns at once."""

    def any(self, flag: bool) -> bool:
        return flag


class GroupRanks:
    """The ranks of a process group.

    Args:
        group: a torch.distributed process group; None is all ranks of the job.
        device: device of the tensors that the group's backend accepts, such as "cuda" for NCCL.
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
    """Shared work failed on another process, which raised the original error."""


def in_step(ranks: Ranks, shares: Iterable[T], do: Callable[[T], None], what: str) -> None:
    """Calls `do` for each of this rank's `shares`, and synchronises the ranks after every call.

    So no rank waits longer than one call takes (process groups time out after minutes), and an error on one rank
    stops all of them.

    Args:
        ranks: the ranks that divide the work.
        shares: the shares of this rank; ranks may have different numbers of them.
        do: processes one share.
        what: name of the work for the error on the other ranks.

    Raises:
        OtherRankError: `do` failed on another rank. An exception of `do` on this rank propagates after the others
            have been informed.
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
