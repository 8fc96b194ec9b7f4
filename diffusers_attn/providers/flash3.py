"""FlashAttention-3 (arXiv 2407.08608), for Hopper: `flash_attn_interface`, built from `hopper` in its repository, or
from the Hub.

One operator serves dense and variable-length calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Adapter
from .flash_family import FlashAttention, FlashSettings, Gradients, SequenceLengths, call_kernel, takes_window_pair


class Flash3Functions(NamedTuple):
    """The operators of `flash_attn_interface`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Flash3(FlashAttention):
    """The dense and the variable-length form of one operator."""

    functions: ClassVar[Flash3Functions]

    @classmethod
    def over(cls, package: ModuleType | None, source: str) -> type[Adapter]:
        forward = getattr(package, "_flash_attn_forward")  # noqa: B009 (mypy: the package may be None)
        if takes_window_pair(forward):
            raise ImportError(
                "flash_attn_interface has no operator flash_attn_3::_flash_attn_forward; builds since 2025-09 have it"
            )
        functions = Flash3Functions(forward, getattr(package, "_flash_attn_backward"))  # noqa: B009
        return type(cls.__name__, (cls,), {"functions": functions})

    @classmethod
    def run(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: SequenceLengths | None,
        settings: FlashSettings,
        **descales: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse. `descales` are the factors of float8 tensors."""
        cu_query, cu_key, max_query, max_key = lengths or (None, None, None, None)
        out, lse, _, _ = call_kernel(
            cls.functions.forward, query, key, value, cu_seqlens_q=cu_query, cu_seqlens_k=cu_key,
            max_seqlen_q=max_query, max_seqlen_k=max_key, softmax_scale=settings.scale, causal=settings.is_causal,
            window_size_left=settings.window[0], window_size_right=settings.window[1], softcap=settings.softcap,
            **descales,
        )  # fmt: skip
        return out, lse

    @classmethod
    def run_backward(
        cls,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: SequenceLengths | None,
        settings: FlashSettings,
    ) -> Gradients:
        cu_query, cu_key, max_query, max_key = lengths or (None, None, None, None)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        call_kernel(
            cls.functions.backward, grad_out, query, key, value, out, lse, cu_seqlens_q=cu_query, cu_seqlens_k=cu_key,
            max_seqlen_q=max_query, max_seqlen_k=max_key, dq=grad_query, dk=grad_key, dv=grad_value,
            softmax_scale=settings.scale, is_causal=settings.is_causal, window_size_left=settings.window[0],
            window_size_right=settings.window[1], softcap=settings.softcap, deterministic=settings.deterministic,
        )  # fmt: skip
        return grad_query, grad_key, grad_value
