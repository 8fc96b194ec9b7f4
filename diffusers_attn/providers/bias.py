"""A mask as the additive bias that CUTLASS and cuDNN kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masks
from .row_liveness import known_live

ALIGNMENT = 16
"""elements between the starts of two rows: a multiple of this lets kernels load them in their widest way."""


def aligned_bias(mask: Tensor, dtype: torch.dtype, key_len: int) -> tuple[Tensor, Tensor | None]:
    """A bias `[batch | 1, heads | 1, query | 1, key_len]` and the rows in which no key is left (`masks.dead_rows`).

    Instead of the rows, None where it is known that there are none.
    Dead rows attend to everything in this bias: the caller clears what comes out of them. What the mask has in common
    for all queries, heads or sequences is kept once; `expand` makes it the kernel's shape by strides of zero.
    """
    dead = None if known_live(mask) else masks.dead_rows(mask)
    bias = masks.as_bias(mask, dead, dtype)
    if bias.shape[-1] != key_len:
        bias = bias.expand(*bias.shape[:-1], key_len)
    short = -key_len % ALIGNMENT
    if short:
        return torch.nn.functional.pad(bias, (0, short))[..., :key_len], dead
    return (bias if bias.stride(-1) == 1 else bias.contiguous()), dead
