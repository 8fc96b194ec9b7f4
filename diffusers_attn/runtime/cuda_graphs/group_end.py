"""Drops recordings before process groups end.

NCCL does not end a communicator while a CUDA graph that uses it is alive: `destroy_process_group` would wait forever.
PyTorch has no hook there, so the public function is wrapped, under both of its names.
"""

from __future__ import annotations

import atexit
import functools
from typing import Any

import torch.distributed as dist

from .graphs import drop_all


@functools.cache
def drop_before_groups_end() -> None:
    """Has all recordings dropped when a process group or the process ends."""
    atexit.register(drop_all)
    if not dist.is_available():
        return
    from torch.distributed import distributed_c10d

    destroy = distributed_c10d.destroy_process_group

    @functools.wraps(destroy)
    def after_dropping(group: Any = None) -> None:
        drop_all()
        destroy(group)

    distributed_c10d.destroy_process_group = after_dropping
    dist.destroy_process_group = after_dropping
