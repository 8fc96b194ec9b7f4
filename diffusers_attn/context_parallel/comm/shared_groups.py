"""The process groups that enabling context parallelism makes: shared by all that need the same, and ended with the
last of them.

A group costs threads, sockets and, on GPUs, a communicator with its buffers. Who needs one gets a `Lease`. Groups whose
leases are all closed, or gone with the models that held them, are destroyed by `end_unused`, which is called where
ranks are together anyway: never by the garbage collector, in the middle of an exchange.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...errors import AttentionProviderError
from . import one_thread, process_groups

Agree = Callable[[Any], list[Any]]
"""what all ranks concerned say, given what this one says."""


class _Made:
    """Groups that were made together."""

    def __init__(self, number: int, groups: Sequence[dist.ProcessGroup]) -> None:
        self.number = number
        self.groups = list(groups)
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self.captured = False
        """whether a CUDA graph of the user's own repeats exchanges of these groups: then they are never destroyed, for
        NCCL would wait until the graph is."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(group.group_name for group in self.groups)


class Lease:
    """The use of some groups, until it is closed. Without meaning in another process."""

    __slots__ = ("__weakref__", "_made")

    def __init__(self, made: _Made | None = None) -> None:
        self._made = made
        if made is not None:
            made.leases.add(self)

    @property
    def names(self) -> tuple[str, ...]:
        """what functional collectives know the groups by."""
        return () if self._made is None else self._made.names

    def again(self) -> Lease:
        """Another lease of the same groups."""
        return Lease(self._made)

    def close(self) -> None:
        if self._made is not None:
            self._made.leases.discard(self)
            self._made = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self.again()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, ()


_latest: dict[Hashable, _Made] = {}
_all: list[_Made] = []
_numbers: dict[Hashable, int] = {}
"""how often groups of a key were made."""


def lease(key: Hashable, agree: Agree, make: Callable[[int], Sequence[dist.ProcessGroup]]) -> Lease:
    """A lease of the groups of this `key`: those that all ranks have, or else new ones that `make` makes, given a
    number that was never used for this key before. All ranks concerned must call this."""
    made = _latest.get(key)
    if made is not None and not all(map(process_groups.is_alive, made.groups)):
        made = None
    # A rank may have lost its own with a model that was not disabled. Then all make new ones.
    said = agree((None if made is None else made.number, _numbers.get(key, 0)))
    if made is None or any(number != made.number for number, _ in said):
        _numbers[key] = number = 1 + max(used for _, used in said)
        made = _latest[key] = _Made(number, make(number))
        _all.append(made)
    return Lease(made)


def control_group(ranks: Sequence[int], timeout: datetime.timedelta, agree: Agree) -> Lease:
    """A lease of a gloo group of these ranks, in this order, for what they tell each other through the CPU's memory.
    Nothing else is sent over it, so that what is said never takes the place of a tensor. Only these ranks call this."""
    members = tuple(ranks)

    def make(number: int) -> list[dist.ProcessGroup]:
        seconds = timeout.total_seconds()
        name = f"diffusers_attn/{'_'.join(map(str, members))}/{seconds:g}/{number}"
        return [process_groups.new_gloo_group(members, name, timeout)]

    return lease(("control", members, timeout), agree, make)


def end_unused() -> None:
    """Destroys the groups that nobody has a lease of any more."""
    for made in [each for each in _all if not each.leases and not each.captured]:
        _all.remove(made)
        for key in [key for key, each in _latest.items() if each is made]:
            del _latest[key]
        for group in made.groups:
            one_thread.forget(group.group_name)
            if process_groups.is_alive(group):
                dist.destroy_process_group(group)


def keep_if_captured(names: Sequence[str]) -> None:
    """Notes that the current stream, if it is being captured, gets exchanges of these groups into a CUDA graph."""
    if torch.cuda.is_current_stream_capturing():
        for made in _all:
            if any(name in names for name in made.names):
                made.captured = True


def as_timeout(timeout: datetime.timedelta | float | None, device_type: str) -> datetime.timedelta:
    """`timeout`, or the job's own where it is None.

    Raises:
        AttentionProviderError: it is no length of time.
    """
    if timeout is None:
        return process_groups.timeout_of(None, device_type)
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and 0 < timeout < 1e9:
        return datetime.timedelta(seconds=timeout)
    if isinstance(timeout, datetime.timedelta) and timeout > datetime.timedelta(0):
        return timeout
    raise AttentionProviderError(
        f"timeout={timeout!r}: a number of seconds above 0, a datetime.timedelta, or None for the timeout of the job "
        "(torch.distributed.init_process_group(timeout=...)) is accepted."
    )


def of_device(timeout: datetime.timedelta, group: dist.ProcessGroup | None = None) -> datetime.timedelta:
    """How long exchanges between devices wait. NCCL ends the process, without naming a rank: so it waits longer than
    the ranks' hosts do, whose error names the missing one."""
    nccl = "nccl" in dist.get_backend_config(group)
    return timeout + max(timeout / 4, datetime.timedelta(seconds=10)) if nccl else timeout


def give_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta, device_type: str, always: bool) -> None:
    """Has a group of the user's wait so long: `always`, or where it has the timeout that PyTorch gives when nobody says
    anything. `init_device_mesh` has no argument for it."""
    if always or process_groups.timeout_of(group, device_type) == process_groups.default_timeout(group):
        process_groups.set_timeout(group, of_device(timeout, group))
