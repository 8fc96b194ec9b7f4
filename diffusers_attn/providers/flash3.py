"""FlashAttention-3 (arXiv 2407.08608), for Hopper: `flash_attn_interface`, built from `hopper` in its repository.

One operator serves dense and variable-length calls.
"""

from __future__ import annotations

import flash_attn_interface  # noqa: F401 (registers the operators)
import torch
from torch import Tensor

from .flash_family import FlashAttention, Gradients, SequenceLengths, Settings

if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
    raise ImportError(
        "flash_attn_interface has no operator flash_attn_3::_flash_attn_forward; builds since 2025-09 have it"
    )
_forward, _backward = torch.ops.flash_attn_3._flash_attn_forward, torch.ops.flash_attn_3._flash_attn_backward


class Flash3(FlashAttention):
    """The dense and the variable-length form of one operator."""

    @classmethod
    def dense_forward(cls, query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        return _run(query, key, value, None, settings)

    @classmethod
    def dense_backward(
        cls, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, settings: Settings
    ) -> Gradients:
        return _run_backward(grad_out, query, key, value, out, lse, None, settings)

    @classmethod
    def varlen_forward(
        cls, query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        return _run(query, key, value, lengths, settings)

    @classmethod
    def varlen_backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: SequenceLengths,
        settings: Settings,
    ) -> Gradients:
        return _run_backward(grad_out, query, key, value, out, lse, lengths, settings)


def _run(
    query: Tensor, key: Tensor, value: Tensor, lengths: SequenceLengths | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    cu_query, cu_key, max_query, max_key = lengths or (None, None, None, None)
    out, lse, _, _ = _forward(
        query, key, value, cu_seqlens_q=cu_query, cu_seqlens_k=cu_key, max_seqlen_q=max_query, max_seqlen_k=max_key,
        softmax_scale=settings.scale, causal=settings.is_causal, window_size_left=settings.window[0],
        window_size_right=settings.window[1], softcap=settings.softcap,
    )  # fmt: skip
    return out, lse


def _run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: SequenceLengths | None,
    settings: Settings,
) -> Gradients:
    cu_query, cu_key, max_query, max_key = lengths or (None, None, None, None)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    _backward(
        grad_out, query, key, value, out, lse, cu_seqlens_q=cu_query, cu_seqlens_k=cu_key, max_seqlen_q=max_query,
        max_seqlen_k=max_key, dq=grad_query, dk=grad_key, dv=grad_value, softmax_scale=settings.scale,
        is_causal=settings.is_causal, window_size_left=settings.window[0], window_size_right=settings.window[1],
        softcap=settings.softcap, deterministic=settings.deterministic,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
