"""Symmetric memory between CPU processes, in place of that between GPUs: files that all of a group have mapped.

With it, `symmetric_gather` sends keys and values and keeps its promises about slots as it does on GPUs. Only what runs
beside what
is not as there: copies are made when they are asked for.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from diffusers_attn.context_parallel.comm.symmetric_gather import SymmetricGather, open_gather
from diffusers_attn.context_parallel.mesh import Group


class FileMemory:
    """`nbytes` of every rank of `group`, in files that go away with the last process that has them mapped."""

    def __init__(self, group: Group, nbytes: int) -> None:
        self._group = _resolve_process_group(group.name)
        file, own = tempfile.mkstemp()
        os.truncate(file, nbytes)
        os.close(file)
        paths = [None] * group.size
        dist.all_gather_object(paths, own, group=self._group)
        self.buffers = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        self.barrier(0)
        os.remove(own)

    def barrier(self, channel: int) -> None:
        dist.barrier(self._group)


class NoLane:
    """Everything in the order in which it is given. `captured` is what a CUDA stream would say of itself."""

    def __init__(self) -> None:
        self.captured = False

    def is_captured(self) -> bool:
        return self.captured

    def fork(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def join(self) -> None: ...
    def drain(self) -> None: ...


def open_shared(group: Group, lane: NoLane | None = None) -> SymmetricGather:
    """The gather of `group` over memory of this kind. To be held as long as it is used."""
    lane = lane or NoLane()
    return open_gather(group, lambda: SymmetricGather(group, lambda nbytes: FileMemory(group, nbytes), lane, lane))
