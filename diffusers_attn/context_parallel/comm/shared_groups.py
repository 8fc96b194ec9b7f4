"""The process groups of context parallelism. They are shared by their users and destroyed after the last one.

A group costs threads, sockets and, on GPUs, a communicator with its buffers. Each user of a group holds a `Lease`.
`end_unused` destroys groups whose leases are all closed or were freed with their models. It is called where the ranks
are synchronised anyway, and never by the garbage collector in the middle of an exchange.
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
"""Gathers a value of this rank from all ranks concerned."""


class _GroupSet:
    """Groups that were made together."""

    def __init__(self, number: int, groups: Sequence[dist.ProcessGroup]) -> None:
        self.number = number
        self.groups = list(groups)
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self.captured = False
        """Whether a user's CUDA graph repeats exchanges of these groups. Such groups are never destroyed, because NCCL
        would wait until the graph is destroyed."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(group.group_name for group in self.groups)


class Lease:
    """The right to use some groups until it is closed. In another process it is empty."""

    __slots__ = ("__weakref__", "_group_set")

    def __init__(self, group_set: _GroupSet | None = None) -> None:
        self._group_set = group_set
        if group_set is not None:
            group_set.leases.add(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups for functional collectives."""
        return () if self._group_set is None else self._group_set.names

    def another(self) -> Lease:
        """Another lease of the same groups."""
        return Lease(self._group_set)

    def close(self) -> None:
        if self._group_set is not None:
            self._group_set.leases.discard(self)
            self._group_set = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self.another()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, ()


_latest: dict[Hashable, _GroupSet] = {}
_all: list[_GroupSet] = []
_numbers: dict[Hashable, int] = {}
"""Number of times that groups of a key were created."""


def lease(key: Hashable, agree: Agree, make: Callable[[int], Sequence[dist.ProcessGroup]]) -> Lease:
    """A lease of the groups of this `key`: existing groups, if all ranks have the same; otherwise new groups from
    `make(number)`, with a number that was never used for this key. All ranks concerned must call this."""
    group_set = _latest.get(key)
    if group_set is not None and not all(map(process_groups.is_alive, group_set.groups)):
        group_set = None
    # A rank may have lost its groups with a model that was freed without being disabled. Then all ranks make new ones.
    answers = agree((None if group_set is None else group_set.number, _numbers.get(key, 0)))
    if group_set is None or any(number != group_set.number for number, _ in answers):
        _numbers[key] = number = 1 + max(used for _, used in answers)
        group_set = _latest[key] = _GroupSet(number, make(number))
        _all.append(group_set)
    return Lease(group_set)


def control_group(ranks: Sequence[int], timeout: datetime.timedelta, agree: Agree) -> Lease:
    """A lease of a gloo group of these ranks, in this order, for control messages in CPU memory. It carries no other
    data, so that a message is never received in place of a tensor. Only these ranks call this."""
    members = tuple(ranks)

    def make(number: int) -> list[dist.ProcessGroup]:
        seconds = timeout.total_seconds()
        name = f"diffusers_attn/{'_'.join(map(str, members))}/{seconds:g}/{number}"
        return [process_groups.new_gloo_group(members, name, timeout)]

    return lease(("control", members, timeout), agree, make)


def end_unused() -> None:
    """Destroys the groups without a lease."""
    for group_set in [each for each in _all if not each.leases and not each.captured]:
        _all.remove(group_set)
        for key in [key for key, each in _latest.items() if each is group_set]:
            del _latest[key]
        for group in group_set.groups:
            one_thread.forget(group.group_name)
            if process_groups.is_alive(group):
                dist.destroy_process_group(group)


def keep_if_captured(names: Sequence[str]) -> None:
    """Marks these groups as captured if the current stream is being captured into a CUDA graph."""
    if torch.cuda.is_current_stream_capturing():
        for group_set in _all:
            if any(name in names for name in group_set.names):
                group_set.captured = True


def as_timeout(timeout: datetime.timedelta | float | None, device_type: str) -> datetime.timedelta:
    """`timeout` in seconds or as a timedelta; None is the timeout of the job.

    Raises:
        AttentionProviderError: `timeout` is no positive length of time.
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
    """The timeout of exchanges between devices. With NCCL it is longer than that of the hosts: NCCL ends the process
    without naming a rank, and the error of the hosts names the missing one."""
    nccl = "nccl" in dist.get_backend_config(group)
    return timeout + max(timeout / 4, datetime.timedelta(seconds=10)) if nccl else timeout


def give_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta, device_type: str, always: bool) -> None:
    """Sets the timeout of a user's group: `always`, or only if it has PyTorch's default timeout. (`init_device_mesh`
    has no argument for a timeout.)"""
    if always or process_groups.timeout_of(group, device_type) == process_groups.default_timeout(group):
        process_groups.set_timeout(group, of_device(timeout, group))
