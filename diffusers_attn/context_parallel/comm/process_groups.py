"""Access to private functions of torch.distributed about process groups, which only this file uses."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def resolve(name: str) -> dist.ProcessGroup:
    """The group with this name, as functional collectives use it."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def job_store() -> Any:
    """The store of the job's default process group. A `set` does not wait for an answer."""
    return distributed_c10d._get_default_store()


_connection: tuple[Any, Any] = (None, None)
"""A job's store, and another connection to it."""


def own_store() -> Any:
    """The job's store, over a connection of this library: one that waits for a key serves no other thread meanwhile."""
    global _connection
    store = job_store()
    if _connection[0] is not store:
        try:
            _connection = store, store.clone()
        except RuntimeError:  # a kind of store that has one user only
            _connection = store, store
    return _connection[1]


all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""`torch.distributed.all_gather_into_tensor`, which PyTorch 2.13 renamed."""


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether the group can still be used and destroyed: neither the group nor the job has been destroyed."""
    return dist.is_initialized() and group in distributed_c10d._world.pg_map


def timeout_of(group: dist.ProcessGroup | None, device_type: str) -> datetime.timedelta:
    """The timeout of exchanges of this group; None is the group of all ranks."""
    group = dist.group.WORLD if group is None else group
    try:
        options: Any = group._get_backend(torch.device(device_type)).options  # type: ignore[union-attr]
        return options._timeout
    except (RuntimeError, AttributeError):  # a backend without options, which never waits
        return dist.constants.default_pg_timeout


def set_timeout(group: dist.ProcessGroup | None, timeout: datetime.timedelta) -> None:
    """Sets the timeout of later exchanges of this group; None is the group of all ranks."""
    distributed_c10d._set_pg_timeout(timeout, group)


def default_timeout(group: dist.ProcessGroup) -> datetime.timedelta:
    """PyTorch's default timeout for the backend of this group."""
    return distributed_c10d._get_default_timeout(dist.get_backend(group))


def new_gloo_group(ranks: Sequence[int], name: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """A gloo group of these ranks, in this order. Only these ranks call this, with the same unused name.

    `torch.distributed.new_group(use_local_synchronization=True)` names a group by its ranks and the number of existing
    groups. So a name repeats after a group is destroyed, together with the stale addresses in the store, and ranks with
    different numbers of groups never find each other. A name that was never used before avoids both.
    """
    helper: Any = distributed_c10d._new_process_group_helper
    group, _ = helper(
        len(ranks), list(ranks).index(dist.get_rank()), list(ranks), dist.Backend("gloo"), job_store(), name,
        timeout=timeout, group_desc="diffusers_attn",
    )  # fmt: skip
    distributed_c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    # A rank that is connected to all others may end the group while two others still connect, which then fail.
    dist.barrier(group)
    return group
