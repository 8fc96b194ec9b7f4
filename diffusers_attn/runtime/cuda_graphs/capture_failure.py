"""Puts PyTorch back in order after a CUDA graph capture that failed.

Before PyTorch 2.13, a capture that CUDA has invalidated leaves three things behind: the current stream is still the
capture's, the caching allocator believes that a capture is underway, and the device's default random generator is in
capture mode. The interfaces that put these right are private to PyTorch, and used only in this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def restored_after_failure(device: torch.device, pool: Any) -> Iterator[None]:
    """Context for a capture into memory pool `pool`. An error that leaves it is raised, with PyTorch as it was."""
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[stream.device_index]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        generator.graphsafe_set_state(state)
        raise
