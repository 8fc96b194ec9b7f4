"""Serving a call that a kernel does not take as it is, without changing a number of the result.

- Fewer key heads: repeat them.
- A head_dim that is not the kernel's multiple: zeros in query and key add nothing to a score, zeros in the value give
  columns that are cut off. The scale stays that of the true head_dim.
- Causal with unequal lengths, for a kernel that knows only square causality. PyTorch aligns to the top left, so with
  a shorter query the keys past its length are seen by nobody ("drop_keys"), and with a longer one the queries past the
  keys see all of them ("two_calls").
- Causal with a mask: one mask.
- Batch sizes of one, and heads of one where others have more: expanded.
- Nothing to attend to: zeros. Kernels divide by the length or fault.
"""

from __future__ import annotations

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
    mask: Tensor | None = None,
    *,
    adapter: type[Adapter],
    plan: Serving,
    params: Params,
) -> Tensor:
    """`adapter.attention` with the lowerings of `plan`; tensors in the adapter's layout."""
    bhsd = adapter.layout == "bhsd"
    heads, seq = (1, 2) if bhsd else (2, 1)
    if plan.empty:
        return _nothing(query, key, value, mask, heads, seq)
    if plan.broadcast:
        query, key, value = shapes.broadcast(query, key, value, heads)
    if plan.repeat_kv:
        groups = query.shape[heads] // key.shape[heads]
        key, value = key.repeat_interleave(groups, dim=heads), value.repeat_interleave(groups, dim=heads)
    value_dim = value.shape[-1]
    if plan.pad_head_dim:
        query, key, value = (pad(tensor, (0, plan.pad_head_dim - tensor.shape[-1])) for tensor in (query, key, value))
        params = params._replace(default_scale=False)
    query_len, key_len = query.shape[seq], key.shape[seq]
    if plan.causal == "mask":
        mask = masks.and_causal(mask, query_len, key_len)  # type: ignore[arg-type]
        params = params._replace(is_causal=False)
    if plan.causal == "drop_keys":
        key, value = key.narrow(seq, 0, query_len), value.narrow(seq, 0, query_len)
    if plan.causal == "two_calls":
        square = adapter.attention(query.narrow(seq, 0, key_len), key, value, mask, params=params)
        after = query.narrow(seq, key_len, query_len - key_len)
        full = adapter.attention(after, key, value, mask, params=params._replace(is_causal=False))
        out = torch.cat([square, full], dim=seq)
    else:
        out = adapter.attention(query, key, value, mask, params=params)
    return out[..., :value_dim] if plan.pad_head_dim else out


def _nothing(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, seq: int) -> Tensor:
    """Zeros of the result's shape, through which gradients of zero flow to all inputs.

    Sums over slices without entries: zero whatever the entries are, where a product with zero makes NaN of infinity.
    Squares, so that gradients have gradients.
    """
    sizes = [shapes.joint(*(tensor.shape[dim] for tensor in (query, key, value))) for dim in (0, heads)]
    shape = [sizes[0], query.shape[seq], query.shape[seq], value.shape[-1]]
    shape[heads] = sizes[1]
    inputs = [query, key, value] if mask is None or mask.dtype == torch.bool else [query, key, value, mask]
    zero = sum(tensor[..., :0].square().sum().to(query.dtype) for tensor in inputs)
    return query.new_zeros(shape) + zero
