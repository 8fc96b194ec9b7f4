"""The transport of keys and values to other ranks of a ring, chosen once, when context parallelism is applied.

"symmetric" writes into the memory of the other GPUs with copy engines (`symmetric_gather`), concurrently with
computation. It needs CUDA, a group of NCCL, and one machine whose GPUs reach each other. "collective" is a functional
collective (`collectives`) and works everywhere. The results are the same.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import symmetric_memory
from .everyone import everyone
from .gather_in_flight import GatherInFlight
from .group import Group
from .process_groups import resolve
from .side_stream import SideStream
from .symmetric_gather import SymmetricGather, open_gather

SYMMETRIC = "symmetric"
COLLECTIVE = "collective"


class Transport(NamedTuple):
    """The chosen transport. Plain values, which a compiled graph treats as constants."""

    kind: str = COLLECTIVE
    """"symmetric" or "collective"."""
    reason: str = "no other was asked for"


def choose_transport(ring: Group, device_type: str) -> tuple[Transport, SymmetricGather | None]:
    """The fastest transport that `ring` can use, and the owner of its memory, which must live as long as the transport
    is used. On GPUs this is a collective: all ranks of the ring must call it with their GPU as the current device. All
    ranks get the same transport.

    Args:
        device_type: device type of the ranks, "cuda" or "cpu".
    """
    if ring.size == 1:
        return Transport(COLLECTIVE, "a ring of one rank sends nothing"), None
    reason = _not_cuda(ring, device_type)
    if reason is not None:
        return Transport(COLLECTIVE, reason), None
    found = everyone((_machine(), symmetric_memory.missing_interface()), [resolve(ring.name)])
    machines, missing = {machine for machine, _ in found}, [reason for _, reason in found if reason]
    if missing:
        return Transport(COLLECTIVE, missing[0]), None
    if len(machines) > 1:
        return Transport(COLLECTIVE, f"the ring's {ring.size} ranks are on {len(machines)} machines"), None
    group = resolve(ring.name)
    gather: SymmetricGather | None = None

    def open_here() -> None:
        nonlocal gather
        gather = open_gather(ring, lambda: _make(ring))

    # Each step waits for all ranks on their GPUs. So all ranks must have done the one before it.
    for step in (open_here, lambda: _allocate(gather), lambda: _try(gather)):
        failures = [each for each in everyone(_failure(step), [group]) if each is not None]
        if failures:
            return Transport(COLLECTIVE, failures[0]), None
    return Transport(SYMMETRIC, f"{ring.size} GPUs that reach each other's memory"), gather


def _make(group: Group) -> SymmetricGather:
    device = torch.device("cuda", torch.cuda.current_device())
    lanes = SideStream(device), SideStream(device)
    return SymmetricGather(group, lambda nbytes: symmetric_memory.SymmetricMemory(group, nbytes, device), *lanes)


def _not_cuda(ring: Group, device_type: str) -> str | None:
    """Why the ring cannot use CUDA with NCCL; None if it can. Equal on every rank."""
    import torch.distributed as dist

    if device_type != "cuda":
        return f"the mesh is of {device_type} devices"
    backends = dist.get_backend_config(resolve(ring.name))
    return None if "cuda:nccl" in backends else f"the ring's group has the backends {backends}, not cuda:nccl"


def _machine() -> str:
    """An identifier of this machine that does not depend on the names of containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _failure(step: Callable[[], str | None]) -> str | None:
    """The reason why a step failed on this rank: its result, or the error that it raises. None if it succeeded."""
    try:
        return step()
    except Exception as error:
        return f"symmetric memory cannot be used: {type(error).__name__}: {error}".partition("\n")[0]


def _allocate(gather: SymmetricGather | None) -> None:
    """Allocates the least memory, which maps that of every rank into this process."""
    assert gather is not None
    gather.reserve(1)


def _try(gather: SymmetricGather | None) -> str | None:
    """Gathers one row from every rank. Returns the reason of a failure, or None."""
    assert gather is not None
    group = gather.group
    for attempt in range(2):  # both slots
        own = torch.full((1, 1, 1, 8), float(group.rank + 10 * attempt), device=gather.device)
        sizes = (1,) * group.size
        key, value = GatherInFlight.start(own, own, own, sizes, group, needs_grad=False).finish(own)
        expected = [float(rank + 10 * attempt) for rank in range(group.size) if rank != group.rank]
        if key[0, :, 0, 0].tolist() != expected or value[0, :, 0, 7].tolist() != expected:
            return f"on rank {group.rank}, symmetric memory brought {key[0, :, 0, 0].tolist()} instead of {expected}"
    return None
