"""`F.scaled_dot_product_attention`: PyTorch chooses the kernel of each call.

PyTorch does not return the log-sum-exp that several ranks need. For these calls, `Native.kernel` chooses one of the
kernels in `aten_kernels.py` and `aten_cudnn.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import masks, tensor_kinds
from ..masks import MaskKind
from ..tracing.functions import GradientLaidOutAsOutput, GradientLaidOutUnderTransforms
from .aten_cudnn import NO_DROPOUT, Cudnn, needs_full_block
from .aten_kernels import AtenAdapter, CpuFlash, Efficient, Flash, Math
from .base import Params
from .row_liveness import where_live

# The original function: F.scaled_dot_product_attention may have been replaced by attention_dispatch.
scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention


class Native(AtenAdapter):
    """`F.scaled_dot_product_attention`, and where the lse is wanted, the kernel behind it that gives one."""

    @classmethod
    def bind(cls, params: Params) -> Callable[..., Tensor]:
        if params.derived and tensor_kinds.in_forward_mode():
            # The only kernel of PyTorch's with forward-mode derivatives. PyTorch itself chooses another, and raises.
            return Math.bind(params)
        constants: dict[str, Any] = {
            "dropout_p": params.dropout_p,
            "is_causal": params.is_causal,
            "enable_gqa": params.gqa,
        }
        given = {name: value for name, value in constants.items() if value}
        trains_on_gpu = params.device_type == "cuda" and params.needs_grad
        if trains_on_gpu and not params.dropout_p:
            given["dropout_p"] = NO_DROPOUT
        if not params.default_scale:
            given["scale"] = params.scale
        direct = functools.partial(scaled_dot_product_attention, **given) if given else scaled_dot_product_attention
        if params.device_type == "cpu":
            return direct  # nothing to do between the caller and PyTorch
        if trains_on_gpu:
            direct = functools.partial(cls._differentiable, direct, params)
        if params.mask_kind == MaskKind.NONE:
            return direct
        masked = where_live(direct, otherwise=functools.partial(cls._cleared, direct))
        return functools.partial(cls._in_query_dtype, masked) if params.mask_kind in masks.ADDITIVE else masked

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        return cls.bind(params)(query, key, value, *(() if mask is None else (mask,)))

    @classmethod
    def _differentiable(
        cls, direct: Callable[..., Tensor], params: Params, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor
    ) -> Tensor:
        """Calls `direct` for training. PyTorch may choose cuDNN, whose backward has two faults that `Cudnn` avoids; see
        `_cudnn_backward` and `needs_full_block`."""
        if query.ndim != 4:  # PyTorch computes these without a fused kernel
            return direct(query, key, value, *mask)
        avoided = not params.derived and needs_full_block(query.shape[2], key.shape[2])
        # A compiler chooses the layout of a gradient itself, except for an opaque operator.
        if (avoided or torch.compiler.is_compiling()) and cls._is_served_by_cudnn(query, value, mask, params):
            return super().attention(query, key, value, *mask, params=params)
        out = direct(query, key, value, *mask)
        if not out.requires_grad:
            return out
        return (GradientLaidOutUnderTransforms if params.derived else GradientLaidOutAsOutput).apply(out)

    @classmethod
    def _is_served_by_cudnn(cls, query: Tensor, value: Tensor, mask: tuple[Tensor, ...], params: Params) -> bool:
        alone = not params.dropout_p and not any(tensor.requires_grad for tensor in mask)
        return alone and cls.kernel(query, value, mask[0] if mask else None, params) is Cudnn

    @staticmethod
    def _in_query_dtype(
        masked: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        # Cast before the check for dead rows: the most negative float32 number becomes minus infinity in bfloat16.
        return masked(query, key, value, mask if mask.dtype == query.dtype else mask.to(query.dtype))

    @staticmethod
    def _cleared(direct: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        # Unlike the CPU kernel, the GPU kernels give arbitrary values in a row without keys (cuDNN: not even NaN).
        dead = masks.dead_rows(mask)
        return direct(query, key, value, masks.without_dead_rows(mask, dead)).masked_fill(dead, 0.0)

    @classmethod
    def kernel(cls, query: Tensor, value: Tensor, mask: Any, params: Params) -> type[AtenAdapter]:
        """The fastest kernel behind `F.scaled_dot_product_attention` that returns the lse for this call."""
        if query.device.type == "cpu":
            return CpuFlash if query.shape[-1] == value.shape[-1] else Math
        if query.device.type != "cuda":
            return Math
        square = query.shape[2] == value.shape[2] or not params.is_causal
        aligned = query.shape[-1] % 8 == 0 and query.shape[-1] == value.shape[-1]
        half = query.dtype in (torch.float16, torch.bfloat16)
        if (
            half
            and aligned
            and square
            and query.shape[-1] <= 128
            and torch.cuda.get_device_capability(query.device) >= (9, 0)
        ):
            return Cudnn
        if half and aligned and square and mask is None:
            return Flash
        return Efficient if query.dtype != torch.float64 and query.shape[-1] % 8 == 0 else Math

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        return cls.kernel(query, value, mask, params).forward(query, key, value, mask, params)

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
        kernel = cls.kernel(query, value, mask, params)
        batch, kv_heads, key_len, _ = key.shape
        groups = query.shape[1] // kv_heads
        if groups == 1:
            return kernel.backward(grad_out, query, key, value, mask, out, lse, params)
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        grad_query, grad_key, grad_value = kernel.backward(grad_out, query, key, value, mask, out, lse, params)
        grad_key, grad_value = (
            grad.reshape(batch, kv_heads, groups, key_len, -1).sum(dim=2) for grad in (grad_key, grad_value)
        )
        return grad_query, grad_key, grad_value
