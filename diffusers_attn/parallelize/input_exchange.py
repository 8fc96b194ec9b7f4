"""Exchanges of texts, small values and tensors among the ranks that share a sequence, for their inputs.

Texts and values travel through the job's store, so that no rank waits for its device, and waiting can end early.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.comm import meetings, process_groups, shared_groups
from ..context_parallel.comm.everyone import everyone
from ..context_parallel.comm.gather_rows import first_ranks_rows
from ..context_parallel.comm.group import Group
from ..context_parallel.comm.process_groups import resolve
from ..context_parallel.mesh import ContextParallelMesh
from .fingerprint import bytes_of


class Links(NamedTuple):
    """The process groups of the ranks that share a sequence."""

    device: tuple[Group, ...]
    """Groups for tensors on the model's device, the ring's first. Sending from the first rank of each ring, and then
    from the first rank of each Ulysses group, gives all ranks the tensors of rank 0."""
    host: Group
    """A group of all these ranks, in the order of their shards, for tensors in CPU memory."""
    members: tuple[int, ...]
    """The ranks' numbers in the job, in that order."""
    lease: shared_groups.Lease
    """Lease of the `host` group."""

    @staticmethod
    def of(mesh: ContextParallelMesh, timeout: datetime.timedelta | None = None) -> Links:
        """The groups of `mesh`. All its ranks must call this, as it makes the host group unless they have one already.

        Args:
            mesh: the ranks that share a sequence.
            timeout: how long hosts wait for each other; None is the timeout of the job.
        """
        device = tuple(group for group in (mesh.ring, mesh.ulysses) if group.size > 1)
        device_groups = [resolve(group.name) for group in device]

        def gather(value: Any) -> list[Any]:
            return everyone(value, device_groups)

        members = tuple(gather(dist.get_rank()))
        lease = shared_groups.control_group(members, shared_groups.as_timeout(timeout, mesh.device_type), gather)
        return Links(device, Group(lease.names[0], mesh.rank, mesh.size), members, lease)


def differ(text: str, host: Group) -> bool:
    """Whether the ranks' texts differ. The result is equal on all ranks."""
    return len(set(_gather_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), host))) > 1


def values_of_all_ranks(value: Any, host: Group) -> list[tuple[int, Any]]:
    """The value of every rank, a JSON value, with the rank's number."""
    return [tuple(json.loads(each)) for each in _gather_bytes(json.dumps([dist.get_rank(), value]).encode(), host)]


def _gather_bytes(data: bytes, host: Group) -> list[bytes]:
    """The bytes of all ranks, in the order of their shards."""
    group = resolve(host.name)
    members = dist.get_process_group_ranks(group)
    return meetings.gather_bytes(members, data, process_groups.timeout_of(group, "cpu"), f"{host.name}/")


def tensors_of_first_rank(tensors: Sequence[Tensor], device: Sequence[Group], host: Group) -> list[Tensor]:
    """The first rank's tensors, sent in one message for each kind of memory. Shapes and dtypes are equal on all ranks.

    On the first rank, and for empty tensors, the tensors in `tensors` are returned themselves.
    """
    values = list(tensors)
    for on_device in (False, True):
        # Tensors in host memory go over `host`, also those of a model on a CPU.
        mine = [i for i, tensor in enumerate(tensors) if (tensor.device.type != "cpu") == on_device and tensor.numel()]
        if not mine:
            continue
        mine.sort(key=lambda i: -tensors[i].element_size())  # so that each is aligned to its element size
        lengths = [tensors[i].nbytes for i in mine]
        groups = device if on_device else [host]
        if groups[0].rank == 0:
            message = torch.cat([bytes_of(tensors[i]) for i in mine])
        else:  # replaced by the received message
            message = tensors[mine[0]].new_empty(0, dtype=torch.uint8)
        if on_device:
            for group in device:
                message = first_ranks_rows(message, sum(lengths), group)
        else:
            message = message if host.rank == 0 else message.new_empty(sum(lengths))
            dist.broadcast(message, group=resolve(host.name), group_src=0)
        if host.rank == 0:
            continue
        for i, part in zip(mine, message.split(lengths)):
            values[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return values
