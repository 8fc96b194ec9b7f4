"""Keys and values in one tensor, so that one message moves both.

A row has the heads of the key and then those of the value. Attention reads both where they arrive, as views with the
distance of tokens that a packed projection has too.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tails = tuple[tuple[int, int], tuple[int, int]]
"""Heads and head_dim of the key, and of the value."""


def tails_of(key: Tensor, value: Tensor) -> Tails:
    return (key.shape[-2], key.shape[-1]), (value.shape[-2], value.shape[-1])


def pack(key: Tensor, value: Tensor) -> Tensor:
    """`[..., heads * head_dim + value_heads * value_head_dim]`, from `[..., heads, head_dim]` tensors."""
    return torch.cat([key.flatten(-2), value.flatten(-2)], dim=-1)


def unpack(packed: Tensor, tails: Tails) -> list[Tensor]:
    """Key and value as views of `[..., heads, head_dim]`."""
    widths = [heads * head_dim for heads, head_dim in tails]
    return [part.unflatten(-1, tail) for part, tail in zip(packed.split(widths, dim=-1), tails)]
