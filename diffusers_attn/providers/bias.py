"""A mask as the additive bias that CUTLASS and cuDNN kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masks
from .row_liveness import known_live

ALIGNMENT = 16
"""Row strides that are a multiple of this many elements let kernels use their widest loads."""


def aligned_bias(mask: Tensor, dtype: torch.dtype, key_len: int) -> tuple[Tensor, Tensor | None]:
    """A bias `[batch | 1, heads | 1, query | 1, key_len]` and the rows without a key (`masks.dead_rows`).

    The rows are None if it is known that there are none. Dead rows attend to all keys in this bias, and the caller
    clears their output. Values that are equal for all queries, heads or samples are stored once; `expand` gives the
    kernel's shape with strides of zero.
    """
    dead = None if known_live(mask) else masks.dead_rows(mask)
    bias = masks.as_bias(mask, dead, dtype)
    if bias.shape[-1] != key_len:
        bias = bias.expand(*bias.shape[:-1], key_len)
    short = -key_len % ALIGNMENT
    if short:
        return torch.nn.functional.pad(bias, (0, short))[..., :key_len], dead
    return (bias if bias.stride(-1) == 1 else bias.contiguous()), dead
