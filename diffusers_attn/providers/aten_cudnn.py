"""cuDNN's fused attention, as PyTorch calls it, and the ways around faults of its backward.

PyTorch's private operators of cuDNN are called only in this file; those of its other kernels in `aten_kernels.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..tracing.functions import laid_out_as
from .aten_kernels import AtenAdapter, clear_dead_rows, closed_backward, kernel_bias, without_dead_rows
from .base import Params
from .varlen import rows_contiguous

aten = torch.ops.aten

NO_DROPOUT = -0.0
"""Zero, for calls whose backward cuDNN may compute. PyTorch (2.11 at least) keeps the graph of cuDNN's backward by the
bytes of its parameters, which do not include the strides of the output's gradient. The sign is among the bytes: these
calls never get a graph that a call from elsewhere in the process made for a gradient with other strides."""


class Cudnn(AtenAdapter):
    """cuDNN's fused attention, as PyTorch calls it."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        bias, dead = kernel_bias(mask, query, key)
        closed = params.needs_grad and torch.compiler.is_compiling()
        run = cudnn_forward_op if closed else _cudnn_forward
        out, lse = run(query, key, value, bias, params.is_causal, params.scale)
        lse = lse.transpose(1, 2)
        return (out, lse) if dead is None else clear_dead_rows(out, lse, dead)  # type: ignore[return-value]

    @classmethod
    def backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        out: Tensor,
        lse: Tensor,
        params: Params,
    ) -> tuple[Tensor, Tensor, Tensor]:
        key_len, is_causal = key.shape[2], params.is_causal
        short = needs_full_block(query.shape[2], key_len)
        if short:
            if is_causal:  # then there is no mask
                mask, is_causal = masks.causal(query.shape[2], key_len, key.device)[None, None], False
            key, value, mask = with_full_block(key, value, mask)
        bias, dead = kernel_bias(mask, query, key)
        grad_out, lse = without_dead_rows(grad_out, lse.transpose(1, 2), dead)
        run = cudnn_backward_op if torch.compiler.is_compiling() else _cudnn_backward
        grads = run(grad_out, query, key, value, out, lse, bias, is_causal, params.scale)
        return (grads[0], grads[1][:, :, :key_len], grads[2][:, :, :key_len]) if short else grads


def _cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = rows_contiguous(query, key, value)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, True, NO_DROPOUT, is_causal, False, scale=scale
    )
    return out, lse.reshape(query.shape[:3])  # the kernel's has a trailing dimension of one


@torch.library.custom_op("diffusers_attn::cudnn_forward", mutates_args=(), device_types="cuda")
def cudnn_forward_op(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The forward for training, opaque to Inductor like the backward, so that both use the same layouts."""
    out, lse = _cudnn_forward(query, key, value, bias, is_causal, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


@cudnn_forward_op.register_fake
def _(query, key, value, bias, is_causal, scale):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _cudnn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = rows_contiguous(query, key, value)
    seed = torch.empty((), dtype=torch.int64, device=query.device)  # of dropout: not read
    # PyTorch (2.11 at least) builds cuDNN's graph once for the shapes and strides of query, key and value, and reads
    # the output and its gradient with the strides of that time. The forward takes the strides of the output from the
    # query, and so does this function for both.
    grad_out, out = laid_out_as(grad_out, query), laid_out_as(out, query)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, lse.contiguous().unsqueeze(-1), seed, seed, bias, None, None,
        query.shape[2], key.shape[2], NO_DROPOUT, is_causal, scale=scale,
    )  # fmt: skip


# Inductor may give a computed lse strides that cuDNN refuses.
cudnn_backward_op = closed_backward("cudnn_backward", _cudnn_backward)


KEY_BLOCK = 128
"""How many keys cuDNN's backward takes at a time."""


def needs_full_block(query_len: int, key_len: int) -> bool:
    """Whether cuDNN's backward (9.19 at least) needs keys up to the end of a block.

    With half a block at the end, queries whose lse is below -88.7 get a gradient of NaN: the weights of the 64 missing
    keys are exp(0 - lse), which is infinite in float32, times zero (pytorch/pytorch issue 196678). One query with one
    key is refused.
    """
    return key_len % KEY_BLOCK == KEY_BLOCK // 2 or query_len == key_len == 1


def with_full_block(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value (`[B, H, Lk, D]`) and mask with a full last block of keys. No query attends to the new ones."""
    key_len = key.shape[2]
    more = -key_len % KEY_BLOCK
    if mask is None:
        mask = torch.ones(1, 1, 1, key_len, dtype=torch.bool, device=key.device)
    excluded = False if mask.dtype == torch.bool else -math.inf
    mask = F.pad(mask.expand(*mask.shape[:-1], key_len), (0, more), value=excluded)
    key, value = (F.pad(each.transpose(1, 2), (0, 0, 0, 0, 0, more)).transpose(1, 2) for each in (key, value))
    return key, value, mask
