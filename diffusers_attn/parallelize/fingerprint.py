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
    # A dimension of size one may have any stride, 0 if it was expanded, but a view as bytes needs stride 1.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _mixed(tensor: Tensor) -> Tensor:
    raw = bytes_of(tensor)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    position = torch.arange(1, raw.numel() + 1, device=raw.device)
    # A sum modulo 2^64 does not depend on the order of additions. Multipliers are odd, so every bit has an effect.
    mixed = (raw ^ (raw >> 29)) * (2 * position + 1)
    return (mixed ^ (mixed >> 32)).sum()


def _text(number: int) -> str:
    return "%016x" % (number % 2**64)
