"""Key masks for kernels that only take lengths: the kept keys move to the front, and the kernel receives their number.

No value is read on the host: buffers keep the size of the padded batch. So nothing synchronises with the device,
`torch.compile` makes one graph, and a captured CUDA graph serves every mask of the same shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyPacking(NamedTuple):
    """The order of packed keys. It is stable: kept keys stay in the order of the sequence."""

    order: Tensor
    """int64 `[batch * key_len]`: position i of the packed buffer holds key `order[i]` of the flattened batch."""
    keep: Tensor
    """bool `[batch * key_len, 1, 1]`: whether a key of the flattened batch is kept."""
    lengths: Tensor
    """int32 `[batch]`: number of kept keys."""


def pack_keys(mask: Tensor, batch: int, key_len: int, *, across_batch: bool) -> KeyPacking:
    """The packing for a key mask `[batch | 1, 1, 1, key_len | 1]`.

    Args:
        across_batch: True packs the kept keys of all samples without gaps, with unused positions at the end of the
            buffer. False leaves each sample its own `key_len` positions, with unused ones at its end.
    """
    keep = mask.reshape(mask.shape[0], mask.shape[-1]).expand(batch, key_len)
    # Sorted as numbers: not every device sorts bool.
    dropped = (~keep).to(torch.uint8)
    if across_batch:
        order = dropped.flatten().argsort(stable=True)
    else:
        start = torch.arange(batch, device=mask.device).unsqueeze(1) * key_len
        order = (dropped.argsort(dim=1, stable=True) + start).flatten()
    return KeyPacking(order, keep.reshape(-1, 1, 1), keep.sum(dim=1, dtype=torch.int32))


def pack(tensor: Tensor, packing: KeyPacking) -> Tensor:
    """`[batch, key_len, heads, head_dim]` as the packed `[batch * key_len, heads, head_dim]`."""
    return tensor.flatten(0, 1).index_select(0, packing.order)


def unpack_gradient(grad: Tensor, packing: KeyPacking, like: Tensor) -> Tensor:
    """A packed gradient in the shape of `like`; zero for dropped keys, whose positions kernels never write."""
    unpacked = torch.empty_like(grad).index_copy_(0, packing.order, grad)
    return unpacked.masked_fill_(~packing.keep, 0.0).view(like.shape)


def cumulative(lengths: Tensor) -> Tensor:
    """int32 `[batch + 1]`: the start of each sequence, and the end of the last (cu_seqlens)."""
    return torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))


def equal_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """`cumulative` for `batch` sequences of equal length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a contiguous last dimension, which kernels need; other strides are kept."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
