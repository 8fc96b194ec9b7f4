"""xformers' memory_efficient_attention, which chooses between FlashAttention and CUTLASS for each call.

Its kernels take a mask as one additive bias. Dimensions that are equal for all queries or heads have a stride of zero,
so that a key mask costs one row, not a matrix.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha

from . import varlen
from .base import Adapter, Params
from .bias import aligned_bias
from .flash_family import Gradients


def _check_kernels() -> None:
    """Raises ImportError if the package has no kernels here: it then imports all the same, and refuses every call."""
    try:
        built = importlib.import_module("xformers._cpp_lib")
    except ImportError:  # of another version
        return
    if not getattr(built, "_built_with_cuda", True) and torch.version.hip is None:
        raise ImportError(
            "its CUDA kernels do not load, as it was built for another PyTorch, CUDA or Python "
            "(`python -m xformers.info` names them)"
        )


_check_kernels()


class Xformers(Adapter):
    """The adapter. A compiled graph contains the operators below: xformers' choice of a kernel does not trace."""

    @classmethod
    def check_device(cls, device: torch.device) -> str | None:
        limit = getattr(fmha.cutlass.FwOp, "CUDA_MAXIMUM_COMPUTE_CAPABILITY", None)
        capability = torch.cuda.get_device_capability(device)
        if limit is None or capability <= limit:
            return None
        return (
            "the kernel for masks and float32 of the installed xformers supports GPUs up to compute capability "
            "{}.{}; this GPU has {}.{}".format(*limit, *capability)
        )

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        query, key, value = varlen.rows_contiguous(query, key, value)
        bias, dead = (None, None) if mask is None else aligned_bias(mask, query.dtype, key.shape[1])
        run = forward_op if torch.compiler.is_compiling() else _forward
        out, lse = run(query, key, value, bias, params.is_causal, params.scale)
        if dead is not None:
            out, lse = out.masked_fill(dead.transpose(1, 2), 0.0), lse.masked_fill(dead.squeeze(-1), -math.inf)
        return out, lse.transpose(1, 2)

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
    ) -> Gradients:
        grad_out, query, key, value = varlen.rows_contiguous(grad_out, query, key, value)
        out = out.contiguous()  # CUTLASS takes no strides for it
        bias, dead = (None, None) if mask is None else aligned_bias(mask, query.dtype, key.shape[1])
        lse = lse.transpose(1, 2)
        if dead is not None:
            grad_out, lse = grad_out.masked_fill(dead.transpose(1, 2), 0.0), lse.masked_fill(dead.squeeze(-1), math.inf)
        run = backward_op if torch.compiler.is_compiling() else _backward
        return run(grad_out, query, key, value, bias, out, lse.contiguous(), params.is_causal, params.scale)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        query, key, value, _attn_bias(query, key, bias, is_causal), scale=scale
    )
    # CUTLASS pads the lse to a multiple of 32 queries.
    return out, lse[..., : query.shape[1]].contiguous()


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> Gradients:
    return fmha.memory_efficient_attention_backward(
        grad_out, out, lse, query, key, value, _attn_bias(query, key, bias, is_causal), scale=scale
    )


def _attn_bias(query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool) -> Any:
    """xformers' `attn_bias`. Dispatch has merged causality into the mask if there are both."""
    if bias is not None:
        return bias.expand(query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    return fmha.attn_bias.LowerTriangularMask() if is_causal else None


@torch.library.custom_op("diffusers_attn::xformers", mutates_args=(), device_types="cuda")
def forward_op(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward(query, key, value, bias, is_causal, scale)
    return out.contiguous(), lse


@forward_op.register_fake
def _(query, key, value, bias, is_causal, scale):  # type: ignore[no-untyped-def]
    batch, query_len, heads, _ = query.shape
    out = query.new_empty((batch, query_len, heads, value.shape[-1]))
    return out, query.new_empty((batch, heads, query_len), dtype=torch.float32)


@torch.library.custom_op("diffusers_attn::xformers_backward", mutates_args=(), device_types="cuda")
def backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward(grad_out, query, key, value, bias, out, lse, is_causal, scale)
    # xformers' gradients may share memory or follow the layout of the inputs; the results of an operator must not.
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


@backward_op.register_fake
def _(grad_out, query, key, value, *constants):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
