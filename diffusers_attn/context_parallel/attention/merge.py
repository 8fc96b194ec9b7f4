"""Merges partial attention results over different keys."""

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
    """Merges two partial results of the same queries into the result over the keys of both.

    Each output is a weighted mean of values whose weights sum to exp(lse), so the outputs merge with these sums as
    weights. A part in which a query has no key (lse -inf) has weight zero. This function is not differentiable: the
    strategies have their own backward, which uses the lse of all keys.

    Args:
        out, part_out: `[batch, seq, heads, head_dim]`, of any strides.
        lse, part_lse: `[batch, seq, heads]`, float32 at least.
        dtype: dtype in which the outputs merge; default the dtype of `out`.
        out_dtype: dtype of the merged output; default `dtype`.

    Returns:
        The merged output, and lse in the dtype of `lse`.

    In eager mode on a GPU, one Triton kernel merges. A compiler fuses the formulas by itself, together with later
    operations.
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
    """`merge` in PyTorch operations. Tests compare the kernel with it."""
    # Weights from the difference of the two lse sum to one in spite of rounding. If both are -inf, the difference is
    # NaN and any weights are right, because both outputs are zero.
    difference = (part_lse - lse).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).unsqueeze(-1)
    weight, part_weight = torch.sigmoid(-difference).to(dtype), torch.sigmoid(difference).to(dtype)
    merged = out.to(dtype) * weight + part_out.to(dtype) * part_weight
    return merged.to(out_dtype), torch.logaddexp(lse, part_lse)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
