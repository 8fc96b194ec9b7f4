"""64-bit fingerprints of tensors, to compare them between ranks bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """A fingerprint of all bits and their positions. Waits for the tensor's device."""
    return "none" if tensor.numel() == 0 else _text(int(_mixed(tensor)))


def fingerprint_of_all(tensors: Sequence[Tensor]) -> str:
    """One fingerprint of several tensors, in their order. Waits once for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(_mixed(tensor))
    mixed = [torch.stack(each).cpu() for each in by_device.values()]
    return fingerprint(torch.cat(mixed)) if mixed else "none"


def bytes_of(tensor: Tensor) -> Tensor:
    """The elements of `tensor` as a flat tensor of dtype uint8."""
    # A dimension of size one has any stride, 0 where it was expanded, and a view as bytes wants 1.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _mixed(tensor: Tensor) -> Tensor:
    raw = bytes_of(tensor)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    place = torch.arange(1, raw.numel() + 1, device=raw.device)
    # Sums modulo 2^64, which do not depend on their order. Multipliers are odd, so that every bit counts.
    mixed = (raw ^ (raw >> 29)) * (2 * place + 1)
    return (mixed ^ (mixed >> 32)).sum()


def _text(number: int) -> str:
    return "%016x" % (number % 2**64)
