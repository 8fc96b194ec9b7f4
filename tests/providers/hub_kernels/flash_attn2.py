"""`flash_attn_interface` of kernels-community/flash-attn2, version 3: its operators, on the CPU."""

import math

import torch
from torch import Tensor

from . import attention
from ._ops import add_op_namespace_prefix


@torch.library.custom_op(add_op_namespace_prefix("_flash_attn_forward"), mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse = attention.forward(q, k, v, softmax_scale, causal)
    return out, lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@_flash_attn_forward.register_fake
def _(q, *rest):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op(add_op_namespace_prefix("_flash_attn_varlen_forward"), mutates_args=(), device_types="cpu")
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse = attention.packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # of a sequence without keys
    return out, lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@_flash_attn_varlen_forward.register_fake
def _(q, *rest):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op(
    add_op_namespace_prefix("_flash_attn_backward"), mutates_args=("dq", "dk", "dv"), device_types="cpu"
)
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    grads = attention.backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)
    for given, grad in zip((dq, dk, dv), grads):
        given.copy_(grad)
    return torch.empty_like(softmax_lse)


@_flash_attn_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, *rest):
    return torch.empty_like(softmax_lse)


@torch.library.custom_op(
    add_op_namespace_prefix("_flash_attn_varlen_backward"), mutates_args=("dq", "dk", "dv"), device_types="cpu"
)
def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    grads = (dq, dk, dv)
    attention.packed_backward(dout, q, k, v, out, softmax_lse, grads, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    return torch.empty_like(softmax_lse)


@_flash_attn_varlen_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, *rest):
    return torch.empty_like(softmax_lse)
