"""Key masks for kernels that know only lengths: bring the keys that count to the front, tell the kernel how many.

Nothing here looks at a value: buffers keep the size of the padded batch, so there is no synchronisation with the
device, one graph under `torch.compile`, and a CUDA graph that is captured once serves every mask of the same shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyPacking(NamedTuple):
    """Which key went where. The order is stable, so that positions keep their sequence."""

    order: Tensor
    """int64 `[batch * key_len]`: place i of the packed buffer holds key `order[i]` of the flattened batch."""
    keep: Tensor
    """bool `[batch * key_len, 1, 1]`: whether a key of the flattened batch counts."""
    lengths: Tensor
    """int32 `[batch]`: how many keys count."""


def pack_keys(mask: Tensor, batch: int, key_len: int, *, across_batch: bool) -> KeyPacking:
    """The packing for a key mask `[batch | 1, 1, 1, key_len | 1]`.

    Args:
        across_batch: whether the kept keys of all sequences follow each other without gaps, the unused places after
            the last; otherwise each sequence keeps its own `key_len` places, the unused ones at their end.
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
    """A packed gradient in the shape of `like`: zero for keys that do not count, whose places kernels never write."""
    unpacked = torch.empty_like(grad).index_copy_(0, packing.order, grad)
    return unpacked.masked_fill_(~packing.keep, 0.0).view(like.shape)


def cumulative(lengths: Tensor) -> Tensor:
    """int32 `[batch + 1]`: where each sequence begins, and where the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))


def equal_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """`cumulative` of `batch` sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with their last dimension contiguous, as kernels load it; other strides are theirs to take."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
