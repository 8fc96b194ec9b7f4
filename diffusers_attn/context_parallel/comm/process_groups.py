"""What PyTorch keeps to itself of process groups, and this library needs: touched here and nowhere else."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def resolve(name: str) -> dist.ProcessGroup:
    """The group that functional collectives know by this name."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def job_store() -> Any:
    """The store through which the ranks of the job found each other. A `set` does not wait for an answer."""
    return distributed_c10d._get_default_store()


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether the group can still be used and destroyed: nobody has destroyed it, or the whole job."""
    return dist.is_initialized() and group in distributed_c10d._world.pg_map


def timeout_of(group: dist.ProcessGroup | None, device_type: str) -> datetime.timedelta:
    """How long exchanges of this group wait for its ranks; None is the group of all ranks."""
    group = dist.group.WORLD if group is None else group
    try:
        options: Any = group._get_backend(torch.device(device_type)).options  # type: ignore[union-attr]
        return options._timeout
    except (RuntimeError, AttributeError):  # a backend that has no options, and so never waits
        return dist.constants.default_pg_timeout


def set_timeout(group: dist.ProcessGroup | None, timeout: datetime.timedelta) -> None:
    """From now on exchanges of this group, or of all ranks where it is None, wait so long."""
    distributed_c10d._set_pg_timeout(timeout, group)


def default_timeout(group: dist.ProcessGroup) -> datetime.timedelta:
    """What PyTorch gives a group of this backend where nobody says anything."""
    return distributed_c10d._get_default_timeout(dist.get_backend(group))


def new_gloo_group(ranks: Sequence[int], name: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """A gloo group of these ranks, in this order. Only they call this, with the same name.

    `torch.distributed.new_group(use_local_synchronization=True)` names a group by its ranks and by how many groups
    there are. So the name of a group that was destroyed comes again, and with it the addresses that are left in the
    store; and where ranks have different numbers of groups they never meet. Hence a name of one's own, never used
    before.
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
