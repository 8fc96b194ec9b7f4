"""Attention to all keys from attention to parts of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results of the same queries as the result over the keys of both.

    Each output is a mean of values with weights that sum to exp(lse), so they merge with these sums as weights. A part
    in which a query has no key (lse -inf) weighs nothing.

    Args:
        out, part_out: `[batch, seq, heads, head_dim]`; merged in the dtype of `out`.
        lse, part_lse: `[batch, seq, heads]`, float32 at least.
    """
    # The weights from the difference of the two, so that they sum to one whatever rounding does to the total. Where
    # both are -inf their difference is not a number, and any weights will do: both outputs are zero.
    difference = (part_lse - lse).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).unsqueeze(-1)
    weight, part_weight = torch.sigmoid(-difference).to(out.dtype), torch.sigmoid(difference).to(out.dtype)
    return out * weight + part_out.to(out.dtype) * part_weight, torch.logaddexp(lse, part_lse)
