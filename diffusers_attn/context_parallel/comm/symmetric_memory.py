"""Memory on each GPU of a ring that the other GPUs can write to: PyTorch's symmetric memory.

Its interface is private to PyTorch and used only in this file; `missing_interface` lists the names that a version of
PyTorch lacks. Only plain copies and the barrier are used, no multicast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import AttentionProviderError
from .everyone import everyone
from .group import Group
from .process_groups import resolve

ALIGNMENT = 2 * 1024 * 1024
"""Bytes of the smallest allocation of the driver."""
BARRIER_TIMEOUT_MS = 10 * 60 * 1000
"""Timeout of a barrier, equal to NCCL's default. Without a timeout, a rank would wait forever for a peer that died."""


class SymmetricMemory:
    """`nbytes` on the current GPU of every rank of `group`, mapped into this process.

    The constructor is a collective: all ranks of the group must call it with the same `nbytes`, and not while a CUDA
    graph is captured. The memory returns to the driver when the object is freed.

    Raises:
        AttentionProviderError: on all ranks, if the memory of any rank is exhausted.
    """

    def __init__(self, group: Group, nbytes: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory

        # Tensors that are created in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            # The rendezvous waits for all ranks, so all must have memory before any of them begins it.
            failures = everyone(self._allocate(nbytes, device), [resolve(group.name)])
            if any(failures):
                raise AttentionProviderError(
                    f"{nbytes} bytes of symmetric memory are needed on every rank: "
                    + "; ".join(f"shard {rank}: {failure}" for rank, failure in enumerate(failures) if failure)
                )
            self._handle: Any = _symmetric_memory.rendezvous(self._local, group.name)  # type: ignore[arg-type]
            self.buffers: list[Tensor] = [
                self._local if rank == group.rank else self._handle.get_buffer(rank, (nbytes,), torch.uint8)
                for rank in range(group.size)
            ]
        """The memory of each rank as bytes; all are tensors of this rank's device."""

    def _allocate(self, nbytes: int, device: torch.device) -> str | None:
        """Allocates this rank's memory. Returns the error, if there is one."""
        try:
            # Not `_symmetric_memory.empty`: its pool keeps the memory after it is freed.
            self._local: Tensor = _interface().empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None

    def barrier(self, channel: int) -> None:
        """Waits, on the current stream, until all ranks have reached their barrier of this `channel`. Data that they
        wrote before it can be read after it. A barrier leaves no state, so that a CUDA graph can repeat it."""
        self._handle.barrier(channel, BARRIER_TIMEOUT_MS)


def _interface() -> Any:
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


def missing_interface() -> str | None:
    """The names used above that this PyTorch lacks; None if it has all."""
    try:
        from torch.distributed._symmetric_memory import rendezvous  # noqa: F401

        interface = _interface()
    except ImportError as error:
        return f"PyTorch {torch.__version__} has no symmetric memory ({error})"
    lacks = [name for name in ("empty_strided_p2p", "get_buffer", "barrier") if not hasattr(interface, name)]
    return f"PyTorch {torch.__version__} has no _SymmetricMemory.{', '.join(lacks)}" if lacks else None
