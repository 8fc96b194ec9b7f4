"""The kernels that PyTorch ships, one adapter for each; cuDNN's is in `aten_cudnn.py`. PyTorch's private aten operators
are called only in these two files.

An adapter calls the operator of its kernel directly, without `sdpa_kernel`. A direct call returns the log-sum-exp,
traces into one graph and sets no process-wide switch, and an operator that cannot serve a call raises instead of
falling back to another one. `native.py` chooses among these kernels as PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import masks
from ..shapes import Layout
from .base import Adapter, Params
from .bias import aligned_bias
from .varlen import rows_contiguous

aten = torch.ops.aten


class AtenAdapter(Adapter):
    layout: ClassVar[Layout] = "bhsd"


def clear_dead_rows(out: Tensor, lse: Tensor | None, dead: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sets the output (`[B, H, S, D]`) to zero and the lse (`[B, S, H]`) to -inf in `dead` rows, which have no key."""
    out = out.masked_fill(dead, 0.0)
    if lse is not None:
        lse = lse.masked_fill(dead.squeeze(-1).transpose(1, 2), -math.inf)
    return out, lse


class Math(AtenAdapter):
    """Matmul, softmax, matmul. It is also the reference with which tests compare the other kernels."""

    @classmethod
    def attention(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *, params: Params) -> Tensor:
        # The composite operator: its parts have their own derivatives, including that of the bias.
        if mask is not None:
            mask = CpuFlash.bias(mask, query)
        return aten._scaled_dot_product_attention_math(
            query, key, value, mask, params.dropout_p, params.is_causal, scale=params.scale, enable_gqa=params.gqa
        )[0]

    @classmethod
    def scores(cls, query: Tensor, key: Tensor, mask: Tensor | None, params: Params) -> Tensor:
        """Scaled and masked scores `[B, H, Lq, Lk]`, in float32 at least."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * params.scale
        if params.is_causal:
            lower = masks.causal(query.shape[2], key.shape[2], query.device)
            scores = scores.masked_fill(~lower, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        scores = cls.scores(query, key, mask, params)
        lse = scores.logsumexp(dim=-1)
        weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        return (weights @ value.to(scores.dtype)).to(query.dtype), lse.transpose(1, 2)

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
        scores = cls.scores(query, key, mask, params)
        wide = scores.dtype
        weights = (scores - lse.transpose(1, 2).unsqueeze(-1)).exp().nan_to_num(0.0)
        grad_out = grad_out.to(wide)
        grad_weights = grad_out @ value.to(wide).transpose(-1, -2)
        delta = (grad_out * out.to(wide)).sum(dim=-1, keepdim=True)
        grad_scores = weights * (grad_weights - delta) * params.scale
        grad_query = grad_scores @ key.to(wide)
        grad_key = grad_scores.transpose(-1, -2) @ query.to(wide)
        grad_value = weights.transpose(-1, -2) @ grad_out
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


class CpuFlash(AtenAdapter):
    """PyTorch's CPU kernel: forward with lse, and backward. `native` uses it on a CPU."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        query, key, value = rows_contiguous(query, key, value)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, params.is_causal, attn_mask=cls.bias(mask, query), scale=params.scale
        )
        lse = lse.transpose(1, 2)
        if mask is not None:
            # The kernel's output is zero in such rows, but its lse is not minus infinity.
            lse = lse.masked_fill(masks.dead_rows(mask).squeeze(-1).transpose(1, 2), -math.inf)
        return out, lse

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
        bias = cls.bias(mask, query)
        grad_out, query, key, value, out = rows_contiguous(grad_out, query, key, value, out)
        if mask is not None:
            # With lse = -inf a dead row's weights would be exp(-inf + inf).
            lse = lse.masked_fill(lse == -math.inf, 0.0)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse.transpose(1, 2).contiguous(), 0.0, params.is_causal,
            attn_mask=bias, scale=params.scale,
        )  # fmt: skip

    @classmethod
    def bias(cls, mask: Tensor | None, query: Tensor) -> Tensor | None:
        if mask is None or mask.dtype != torch.bool:
            return None if mask is None else mask.to(query.dtype)
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def kernel_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A bias in the shape that kernels take, and the rows to clear (None without any)."""
    if mask is None:
        return None, None
    bias, dead = aligned_bias(mask, query.dtype, key.shape[2])
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]), dead


def closed_backward(name: str, run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """A backward as an operator that is opaque to Inductor, which would choose other strides.

    The memory layout of its gradients is `[batch, seq, heads, head_dim]`, as for the tensors of models.
    """

    def backward(
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
        grads = run(grad_out, query, key, value, out, lse, bias, is_causal, scale)
        return tuple(grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)  # type: ignore[return-value]

    def fake(grad_out, query, key, value, *rest):  # type: ignore[no-untyped-def]
        return tuple(each.new_empty(each.transpose(1, 2).shape).transpose(1, 2) for each in (query, key, value))

    operator = torch.library.custom_op(f"diffusers_attn::{name}", backward, mutates_args=(), device_types="cuda")
    operator.register_fake(fake)
    return operator


class Efficient(AtenAdapter):
    """The memory-efficient kernel (Rabe and Staats, arXiv 2112.05682), as CUTLASS in PyTorch."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        query, key, value = rows_contiguous(query, key, value)
        bias, dead = kernel_bias(mask, query, key)
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, params.is_causal, scale=params.scale
        )
        # The kernel pads the lse to a multiple of 32 queries.
        lse = lse[..., : query.shape[2]].transpose(1, 2)
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
        bias, dead = kernel_bias(mask, query, key)
        grad_out, lse = without_dead_rows(grad_out, lse.transpose(1, 2), dead)
        run = efficient_backward_op if torch.compiler.is_compiling() else _efficient_backward
        return run(grad_out, query, key, value, out, lse, bias, params.is_causal, params.scale)


def _efficient_backward(
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
    grad_out, query, key, value = rows_contiguous(grad_out, query, key, value)
    # The kernel takes no strides for the output. It assumes the layout that it wrote, [batch, seq, heads, head_dim].
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf).contiguous()
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, bias, out, lse, seed, seed, 0.0, [True, True, True, False],
        is_causal, scale=scale,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


# Inductor chooses the strides of an output that was merged from parts, its rule for attention accepts these strides,
# and it removes a `contiguous` that had no effect when the graph was traced.
efficient_backward_op = closed_backward("efficient_backward", _efficient_backward)


class Flash(AtenAdapter):
    """The FlashAttention-2 (Dao, arXiv 2307.08691) that PyTorch ships."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Params) -> tuple[Tensor, Tensor]:
        query, key, value = rows_contiguous(query, key, value)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, params.is_causal, False, scale=params.scale
        )
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, query, key, value, out = rows_contiguous(grad_out, query, key, value, out)
        # Without dropout the random state is not read. Any cum_seq, even an empty one, would mean nested tensors.
        seed = torch.empty(2, dtype=torch.uint64, device=query.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse.transpose(1, 2).contiguous(), None, None,
            query.shape[2], key.shape[2], 0.0, params.is_causal, seed, seed, scale=params.scale,
        )  # fmt: skip


def without_dead_rows(grad_out: Tensor, lse: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """grad_out and lse, `[B, H, S, ...]`, with which a backward gives zero in dead rows: the weights are
    exp(score - lse)."""
    if dead is None:
        return grad_out, lse
    return grad_out.masked_fill(dead, 0.0), lse.masked_fill(dead.squeeze(-1), math.inf)
