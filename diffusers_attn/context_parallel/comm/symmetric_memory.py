"""Memory on each GPU of a ring that the other GPUs can write to: PyTorch's symmetric memory.

Its interface is private to PyTorch and is touched here and nowhere else; `missing_interface` says what of it is gone,
should it move. Of its operations only plain copies and the barrier are used: no multicast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .group import Group

ALIGNMENT = 2 * 1024 * 1024
"""what the driver hands out at least."""
BARRIER_TIMEOUT_MS = 10 * 60 * 1000
"""as NCCL's own. Without one, a rank whose peer has died would wait for it forever."""


class SymmetricMemory:
    """`nbytes` on this rank's current GPU, and the same of every rank of `group`, mapped into this process.

    Making one is a collective: all ranks of the group must, with the same `nbytes`. It may not be made while a CUDA
    graph is captured. The memory goes back to the driver with the object.
    """

    def __init__(self, group: Group, nbytes: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory

        # What is made in inference mode could never be written to outside of it.
        with torch.inference_mode(False):
            # Not by `_symmetric_memory.empty`: what that allocates stays with its pool when it is freed.
            self._local: Tensor = _interface().empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
            self._handle: Any = _symmetric_memory.rendezvous(self._local, group.name)  # type: ignore[arg-type]
            self.buffers: list[Tensor] = [
                self._local if rank == group.rank else self._handle.get_buffer(rank, (nbytes,), torch.uint8)
                for rank in range(group.size)
            ]
        """each rank's memory as bytes; all of them look like tensors of this rank's device."""

    def barrier(self, channel: int) -> None:
        """On the current stream: waits until all ranks have come to their barrier of this `channel`. What they wrote
        before theirs can be read after it. It leaves nothing behind, so that a CUDA graph can repeat it."""
        self._handle.barrier(channel, BARRIER_TIMEOUT_MS)


def _interface() -> Any:
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


def missing_interface() -> str | None:
    """What this PyTorch lacks of what is used above; None where it has all."""
    try:
        from torch.distributed._symmetric_memory import rendezvous  # noqa: F401

        interface = _interface()
    except ImportError as error:
        return f"PyTorch {torch.__version__} has no symmetric memory ({error})"
    lacks = [name for name in ("empty_strided_p2p", "get_buffer", "barrier") if not hasattr(interface, name)]
    return f"PyTorch {torch.__version__} has no _SymmetricMemory.{', '.join(lacks)}" if lacks else None
