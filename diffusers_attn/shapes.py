"""The shapes of query, key and value that `F.scaled_dot_product_attention` accepts together.

Batch dimensions broadcast, and there may be none or several. Heads broadcast too, unless `enable_gqa` repeats those of
key and value.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .errors import AttentionProviderError

Layout = Literal["bshd", "bhsd"]
"""The order of dimensions: `[batch, seq, heads, head_dim]`, or SDPA's `[batch, heads, seq, head_dim]`."""


def check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, layout: Layout) -> None:
    """Raises AttentionProviderError if the shapes, dtypes or devices of query, key and value do not fit together."""
    tensors = {"query": query, "key": key, "value": value}
    problem = _problem(query, key, value, enable_gqa, layout)
    if problem:
        given = ", ".join(
            f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items()
        )
        raise AttentionProviderError(f"{problem}. Given (layout {layout}): {given}.")


def _problem(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, layout: Layout) -> str:
    tensors = query, key, value
    if layout == "bshd" and any(tensor.ndim != 4 for tensor in tensors):
        return "query, key and value must have four dimensions, [batch, seq, heads, head_dim]"
    if any(tensor.ndim < 2 for tensor in tensors):
        return "query, key and value must have at least two dimensions, [..., heads, seq, head_dim]"
    if not query.device == key.device == value.device:
        return "query, key and value must be on one device"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value must have one dtype"
    seq = -2 if layout == "bhsd" else -3
    for dim in range(4, 1 + max(tensor.ndim for tensor in tensors)):
        if not _broadcast([tensor.shape[-dim] for tensor in tensors if tensor.ndim >= dim]):
            return "batch sizes must be equal (or one)"
    if key.shape[seq] != value.shape[seq]:
        return "key and value must have one length"
    if query.shape[-1] != key.shape[-1]:
        return "query and key must have one head_dim"
    heads = [_heads(tensor, layout) for tensor in tensors]
    if enable_gqa:
        # If the two are equal, `serving.refusal` checks that they divide the number of query heads.
        if heads[1] != heads[2] and any(size == 0 or heads[0] % size for size in heads[1:]):
            return "key and value must have one number of heads, or each one that divides the query's"
    elif not _broadcast(heads[1:]):
        return "key and value must have one number of heads (or one)"
    elif not _broadcast(heads):
        return "query and key must have one number of heads, unless enable_gqa=True"
    return ""


def _heads(tensor: Tensor, layout: Layout) -> int:
    return 1 if tensor.ndim == 2 else tensor.shape[-3 if layout == "bhsd" else -2]


def _broadcast(sizes: list[int]) -> bool:
    wide = [size for size in sizes if size != 1]
    return all(size == wide[0] for size in wide)


def joint(*sizes: int) -> int:
    """The size to which `sizes` broadcast. With grouped heads, the size of the query comes first and is returned."""
    for size in sizes:
        if size != 1:
            return size
    return 1


def four_dims(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Tensors without batch or heads, or with several batch dimensions, as `[batch, heads, seq, head_dim]`.

    The number of dimensions may differ between the three. A mask with several batch dimensions is flattened likewise.
    """
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value)))

    def flat(tensor: Tensor) -> Tensor:
        if tensor.ndim < 3:
            tensor = tensor.unsqueeze(0)
        if not batch:
            return tensor.unsqueeze(0)
        return tensor.expand(*batch, *tensor.shape[-3:]).flatten(0, -4)

    if isinstance(mask, Tensor) and mask.ndim > 3 and len(batch) > 1:
        try:
            mask = flat(mask)
        except RuntimeError:
            raise AttentionProviderError(
                f"attn_mask has shape {list(mask.shape)}, which does not broadcast to the batch dimensions "
                f"{list(batch)} of query, key and value."
            ) from None
    return flat(query), flat(key), flat(value), mask


def as_given(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`out`, `[batch, heads, seq, head_dim]`, with the dimensions that the tensors had before `four_dims`."""
    ndim = max(query.ndim, key.ndim, value.ndim)
    if ndim < 4:
        return out.reshape(out.shape[4 - ndim :])
    return out.unflatten(0, torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value))))


def differ(query: Tensor, key: Tensor, value: Tensor, heads: int) -> bool:
    """Whether `broadcast` changes a tensor. `heads` is the dimension of heads."""
    return (
        not query.shape[0] == key.shape[0] == value.shape[0]
        or key.shape[heads] != value.shape[heads]
        or (query.shape[heads] == 1 and key.shape[heads] != 1)
    )


def broadcast(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The 4-D tensors expanded to one batch size, with equal numbers of key and value heads that divide the query's."""
    batch = joint(query.shape[0], key.shape[0], value.shape[0])
    wide = joint(query.shape[heads], key.shape[heads], value.shape[heads])
    same = key.shape[heads] == value.shape[heads]

    def expand(tensor: Tensor, every_head: bool) -> Tensor:
        if every_head and tensor.shape[heads] not in (1, wide):
            tensor = tensor.repeat_interleave(wide // tensor.shape[heads], dim=heads)
        sizes = [batch, -1, -1, -1]
        if every_head:
            sizes[heads] = wide
        return tensor.expand(sizes)

    return expand(query, True), expand(key, not same), expand(value, not same)
