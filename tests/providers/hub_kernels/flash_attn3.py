"""`flash_attn_interface` of kernels-community/flash-attn3, version 1: its operators, on the CPU."""

import torch
from torch import Tensor

from . import attention
from ._ops import add_op_namespace_prefix


@torch.library.custom_op(add_op_namespace_prefix("_flash_attn_forward"), mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, num_splits: int = 1,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    eight_bits = q.dtype == torch.float8_e4m3fn
    if eight_bits:
        starts = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
        q, k, v = (_dequantized(*each) for each in zip((q, k, v), (q_descale, k_descale, v_descale), starts))
    if cu_seqlens_q is not None:
        out, lse = attention.packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    else:
        out, lse = attention.forward(q, k, v, softmax_scale, causal)
    return out.to(torch.bfloat16) if eight_bits else out, lse, q.new_empty(0), q.new_empty(0)


def _dequantized(tensor, descale, starts):
    factor = descale.double().repeat_interleave(tensor.shape[-2] // descale.shape[1], dim=1)
    if starts is None:
        return tensor.double() * factor[:, None, :, None]
    result = tensor.double()
    for sample, where in enumerate(attention.packed(starts)):
        result[where] *= factor[sample, None, :, None]
    return result


@_flash_attn_forward.register_fake
def _(q, *rest, cu_seqlens_q=None, **options):
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    shape = q.shape[1::-1] if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    return q.new_empty(q.shape, dtype=dtype), lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op(
    add_op_namespace_prefix("_flash_attn_backward"), mutates_args=("dq", "dk", "dv"), device_types="cpu"
)
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    inputs = (dout, q, k, v, out, softmax_lse)
    if cu_seqlens_q is not None:
        attention.packed_backward(*inputs, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal)
    else:
        for given, grad in zip((dq, dk, dv), attention.backward(*inputs, softmax_scale, is_causal)):
            given.copy_(grad)
    return torch.empty_like(softmax_lse)


@_flash_attn_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, *rest, **options):
    return torch.empty_like(softmax_lse)
