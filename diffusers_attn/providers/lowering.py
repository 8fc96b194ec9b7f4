"""Serves a call that a kernel does not take as it is, with an exact change of its inputs.

- Fewer key heads: they are repeated.
- A head_dim that is no multiple of the kernel's: zeros are appended. In query and key they add nothing to a score, and
  in the value they give columns that are cut off. The scale stays that of the true head_dim.
- Causal with unequal lengths, for a kernel that has only square causality. PyTorch aligns to the top left. With a
  shorter query, no query sees the keys past its length, so these are dropped ("drop_keys"). With a longer query, the
  queries past the keys see all keys, in a second call ("two_calls").
- Causal with a mask: both become one mask.
- Batch sizes of one, and one head where other tensors have more: expanded.
- No query, or no key: zeros. Kernels divide by the length or fault.

`attention` serves a whole call. `forward` and `backward` serve one part of the keys and also handle the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import masks, shapes
from .base import Adapter, Params
from .serving import Serving


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    *,
    adapter: type[Adapter],
    serving: Serving,
    params: Params,
) -> Tensor:
    """`adapter.attention` with the lowerings of `serving`; differentiable. Tensors have the adapter's layout."""
    heads, seq = (1, 2) if adapter.layout == "bhsd" else (2, 1)
    if serving.empty:
        return _zeros(query, key, value, mask, heads, seq)
    value_dim = value.shape[-1]
    query, key, value, mask = _lower(serving, query, key, value, mask, heads, seq)
    query_len, key_len = query.shape[seq], key.shape[seq]
    if serving.causal == "drop_keys":
        key, value = key.narrow(seq, 0, query_len), value.narrow(seq, 0, query_len)
    if serving.causal == "two_calls":
        square = adapter.attention(query.narrow(seq, 0, key_len), key, value, mask, params=params)
        after = query.narrow(seq, key_len, query_len - key_len)
        full = adapter.attention(after, key, value, mask, params=params._replace(is_causal=False))
        out = torch.cat([square, full], dim=seq)
    else:
        out = adapter.attention(query, key, value, mask, params=params)
    return out[..., :value_dim] if serving.pad_head_dim else out


def forward(
    serving: Serving, params: Params, query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> tuple[Tensor, Tensor]:
    """The output `[batch, query_len, heads, value_head_dim]` and the lse `[batch, query_len, heads]`; no autograd.

    Args:
        query, key, value: `[batch, seq, heads, head_dim]`, whatever layout the kernel has.
    """
    heads, seq = (1, 2) if serving.layout == "bhsd" else (2, 1)
    value_dim = value.shape[-1]
    query, key, value = to_layout(serving, query, key, value)
    query, key, value, mask = _lower(serving, query, key, value, mask, heads, seq)
    out, lse = serving.adapter.forward(query, key, value, mask, params)
    return to_layout(serving, out)[0][..., :value_dim], lse


def backward(
    serving: Serving,
    params: Params,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from what `forward` returned; same shapes as its inputs."""
    heads, seq = (1, 2) if serving.layout == "bhsd" else (2, 1)
    kv_heads, query_dim, value_dim = key.shape[2], query.shape[-1], value.shape[-1]
    query, key, value = to_layout(serving, query, key, value)
    query, key, value, mask = _lower(serving, query, key, value, mask, heads, seq)
    grad_out, out = _pad_head_dim(serving, *to_layout(serving, grad_out, out))
    grads = serving.adapter.backward(grad_out, query, key, value, mask, out, lse, params)
    grad_query, grad_key, grad_value = to_layout(serving, *grads)
    if serving.repeat_kv:
        grad_key, grad_value = (grad.unflatten(2, (kv_heads, -1)).sum(dim=3) for grad in (grad_key, grad_value))
    return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]


def to_layout(serving: Serving, *tensors: Tensor) -> list[Tensor]:
    """Views of `[batch, seq, heads, head_dim]` tensors in the kernel's layout; or, called again, back from it."""
    return [tensor.transpose(1, 2) if serving.layout == "bhsd" else tensor for tensor in tensors]


def _lower(
    serving: Serving, query: Tensor, key: Tensor, value: Tensor, mask: Any, heads: int, seq: int
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """The inputs of the kernel, in its layout, whose heads and sequence are the dimensions `heads` and `seq`."""
    if serving.broadcast:
        query, key, value = shapes.broadcast(query, key, value, heads)
    if serving.repeat_kv:
        groups = query.shape[heads] // key.shape[heads]
        key, value = key.repeat_interleave(groups, dim=heads), value.repeat_interleave(groups, dim=heads)
    query, key, value = _pad_head_dim(serving, query, key, value)
    if serving.causal == "mask":
        mask = masks.and_causal(mask, query.shape[seq], key.shape[seq])
    return query, key, value, mask


def _pad_head_dim(serving: Serving, *tensors: Tensor) -> list[Tensor]:
    if not serving.pad_head_dim:
        return list(tensors)
    return [pad(tensor, (0, serving.pad_head_dim - tensor.shape[-1])) for tensor in tensors]


def _zeros(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, seq: int) -> Tensor:
    """Zeros of the result's shape, through which gradients of zero flow to all inputs.

    They are sums over slices without entries, which are zero whatever the entries are; a product with zero would make
    NaN of infinity. The entries are squared so that gradients have gradients.
    """
    sizes = [shapes.joint(*(tensor.shape[dim] for tensor in (query, key, value))) for dim in (0, heads)]
    shape = [sizes[0], query.shape[seq], query.shape[seq], value.shape[-1]]
    shape[heads] = sizes[1]
    inputs = [query, key, value] if mask is None or mask.dtype == torch.bool else [query, key, value, mask]
    zero = sum(tensor[..., :0].square().sum().to(query.dtype) for tensor in inputs)
    return query.new_zeros(shape) + zero
