"""Quantises attention inputs to float8, as FlashAttention-3 takes them: one factor per sample and key head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
"""448: with the factors below, the largest magnitude of each group is rounded to it."""


def quantize(tensor: Tensor, kv_heads: int, keep: Any = None) -> tuple[Tensor, Tensor]:
    """A tensor in float8, and the factors that it has to be multiplied by.

    Heads of a query that share a key head share a factor, because the kernel has one factor per key head.

    Args:
        tensor: `[batch, length, heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        kv_heads: number of key heads.
        keep: key mask `[batch | 1, 1, 1, length | 1]`, or None. Dropped positions do not influence the factors.

    Returns:
        The tensor in float8_e4m3fn, same shape, and the factors, float32 `[batch, kv_heads]`. Its rounding error is at
        most a sixteenth of each value, or a thousandth of its group's factor if that is more.
    """
    groups = tensor.unflatten(2, (kv_heads, -1))
    if keep is not None:
        groups = groups.masked_fill(~keep.reshape(keep.shape[0], keep.shape[-1], 1, 1, 1), 0.0)
    largest = groups.abs().amax(dim=(1, 3, 4)).float()
    factor = torch.where(largest > 0.0, (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    scaled = groups.float() / factor[:, None, :, None, None]
    return scaled.clamp(-LARGEST, LARGEST).to(DTYPE).flatten(2, 3), factor
