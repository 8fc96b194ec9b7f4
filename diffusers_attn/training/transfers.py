"""What a GPU computes and the host does not wait for, so that it can run ahead: copies, and the time.

A plain copy to or from a GPU waits for all that was launched before it. One from or to page-locked memory does not.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


def to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a host tensor on the device of `like`, and in its dtype."""
    tensor = tensor.to(like.dtype)
    if like.is_cuda and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)


class Moment:
    """The time at which a device has computed all that is launched until now."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Waits until then, and for nothing that was launched later."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, other: Moment) -> float:
        """Seconds from an earlier moment. Both have passed."""
        if self._event is None or other._event is None:
            return self._time - other._time
        return other._event.elapsed_time(self._event) / 1e3


class ToHost:
    """Numbers that a device computes, on their way to the host.

    Attributes:
        computed: the moment at which they are there.

    Args:
        numbers: tensor of one dimension.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._copy = numbers.to("cpu", non_blocking=numbers.is_cuda)  # page-locked if it does not wait
        self.computed = Moment(numbers.device)

    def read(self) -> list[float]:
        """The numbers. Waits for them."""
        self.computed.wait()
        found: list[float] = self._copy.tolist()
        return found
