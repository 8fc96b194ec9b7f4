"""`merge` in one pass over memory. Imported on first use, because not every machine has Triton.

An eager step of Flux on two H200, in a CUDA graph, takes 95.5 ms with this kernel and 101.3 with PyTorch's operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
"""Elements of each output that one program merges."""
_NARROW = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def merge_by_kernel(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`merge_by_formula` for CUDA tensors with a float32 lse. The output is contiguous."""
    batch, seq, heads, head_dim = out.shape
    merged = out.new_empty(out.shape, dtype=out_dtype)
    merged_lse = lse.new_empty(lse.shape)
    rows = batch * seq * heads
    if merged.numel() == 0:
        return merged, torch.logaddexp(lse, part_lse)
    columns = triton.next_power_of_2(head_dim)
    block_rows = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(rows, block_rows),)](
            out, part_out, lse, part_lse, merged, merged_lse,
            *out.stride(), *part_out.stride(), *lse.stride(), *part_lse.stride(),
            rows, seq, heads, head_dim,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=columns, NARROW=_NARROW.get(dtype),
        )  # fmt: skip
    return merged, merged_lse


@triton.jit
def _rounded(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return values.to(dtype).to(tl.float32)


# ruff: noqa: N803  (constants of a kernel are in capitals)
@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    out, part_out, lse, part_lse, merged, merged_lse,
    out_batch, out_seq, out_head, out_column,
    part_batch, part_seq, part_head, part_column,
    lse_batch, lse_seq, lse_head,
    part_lse_batch, part_lse_seq, part_lse_head,
    rows, seq, heads, head_dim,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Each program merges some rows; a row is one (batch, seq, head). NARROW is the half precision in which to merge,
    with rounding in the same places as the formula; None merges in float32."""
    number = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    valid = number < rows
    token = number // heads
    # The number of elements may exceed 32 bits, the number of rows does not.
    head = (number % heads).to(tl.int64)
    position = (token % seq).to(tl.int64)
    sample = (token // seq).to(tl.int64)
    row = number.to(tl.int64)

    first = tl.load(lse + sample * lse_batch + position * lse_seq + head * lse_head, mask=valid, other=0.0)
    second = tl.load(
        part_lse + sample * part_lse_batch + position * part_lse_seq + head * part_lse_head, mask=valid, other=0.0
    )
    # The comparison also covers the case that both are -inf.
    difference = tl.where(first == second, 0.0, second - first)
    weight = 1.0 / (1.0 + tl.exp(difference))
    part_weight = 1.0 / (1.0 + tl.exp(-difference))

    inside = valid[:, None] & (column < head_dim)[None, :]
    start = sample * out_batch + position * out_seq + head * out_head
    part_start = sample * part_batch + position * part_seq + head * part_head
    one = tl.load(out + start[:, None] + column[None, :] * out_column, mask=inside, other=0.0)
    other = tl.load(part_out + part_start[:, None] + column[None, :] * part_column, mask=inside, other=0.0)
    if NARROW is None:
        total = one.to(tl.float32) * weight[:, None] + other.to(tl.float32) * part_weight[:, None]
    else:
        total = _rounded(_rounded(one, NARROW) * _rounded(weight, NARROW)[:, None], NARROW)
        total += _rounded(_rounded(other, NARROW) * _rounded(part_weight, NARROW)[:, None], NARROW)
        total = _rounded(total, NARROW)
    tl.store(merged + row[:, None] * head_dim + column[None, :], total.to(merged.dtype.element_ty), mask=inside)

    larger = tl.maximum(first, second)
    total_lse = larger + tl.log(1.0 + tl.exp(-tl.abs(difference)))
    tl.store(merged_lse + row, tl.where(larger == float("-inf"), larger, total_lse), mask=valid)
