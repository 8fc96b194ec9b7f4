"""Attention to all keys from attention to parts of them."""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
from torch import Tensor


def merge(
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Two partial results of the same queries as the result over the keys of both.

    Each output is a mean of values with weights that sum to exp(lse), so they merge with these sums as weights. A part
    in which a query has no key (lse -inf) weighs nothing. Not differentiable: the strategies have backwards of their
    own, from the lse of all keys.

    Args:
        out, part_out: `[batch, seq, heads, head_dim]`, of any strides.
        lse, part_lse: `[batch, seq, heads]`, float32 at least.
        dtype: what the outputs merge in; default, the dtype of `out`.
        out_dtype: of the merged output; default `dtype`.

    Returns:
        The merged output, and lse in the dtype of `lse`.

    In eager mode on a GPU one Triton kernel does it. A compiler makes one kernel of the formulas by itself, and joins
    what comes after to it.
    """
    dtype = out.dtype if dtype is None else dtype
    out_dtype = dtype if out_dtype is None else out_dtype
    if out.is_cuda and not torch.compiler.is_compiling() and lse.dtype == torch.float32 and _has_triton():
        from .merge_triton import merge_by_kernel

        return merge_by_kernel(out, lse, part_out, part_lse, dtype, out_dtype)
    return merge_by_formula(out, lse, part_out, part_lse, dtype, out_dtype)


def merge_by_formula(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`merge`, written out. Also the definition that the kernel is held to."""
    # The weights from the difference of the two, so that they sum to one whatever rounding does to the total. Where
    # both are -inf their difference is not a number, and any weights will do: both outputs are zero.
    difference = (part_lse - lse).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).unsqueeze(-1)
    weight, part_weight = torch.sigmoid(-difference).to(dtype), torch.sigmoid(difference).to(dtype)
    merged = out.to(dtype) * weight + part_out.to(dtype) * part_weight
    return merged.to(out_dtype), torch.logaddexp(lse, part_lse)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
