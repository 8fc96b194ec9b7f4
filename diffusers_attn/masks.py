"""The masks of attention calls, classified by their shape alone.

Values are never read: that would synchronise with the device, break `torch.compile` and let ranks decide differently.
A mask broadcasts to `[batch, heads, query, key]`. Its kind follows from the dimensions that are larger than one.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import torch

from .errors import AttentionProviderError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class MaskKind(str, enum.Enum):
    """The kind of a mask. Capabilities list the kinds that a provider applies."""

    NONE = "none"
    KEY = "key"
    """Bool, one value per key: `[batch | 1, 1, 1, key]`, such as padding."""
    KEY_BIAS = "key_bias"
    """Additive float, one value per key."""
    DENSE = "dense"
    """Bool with values that differ between heads or queries: rows, outer products, block-diagonal or causal masks."""
    BIAS = "bias"
    """Additive float with values that differ between heads or queries."""
    BLOCK = "block"
    """A `BlockMask` of `torch.nn.attention.flex_attention`."""


ADDITIVE = (MaskKind.KEY_BIAS, MaskKind.BIAS)


def classify(
    mask: torch.Tensor | BlockMask | None, batch: int, heads: int, query_len: int, key_len: int
) -> tuple[MaskKind, torch.Tensor | BlockMask | None]:
    """The kind of `mask`, and the mask as a 4-D view `[batch | 1, heads | 1, query | 1, key | 1]`.

    Head and query dimensions made by `expand` (stride zero) count as broadcast: `[B, 1, 1, Lk]` expanded over them is
    still a key mask. A mask that requires a gradient is an exception, because each entry has its own gradient.

    Args:
        mask: bool (True takes part) or floating (added to the scores), of one to four dimensions that broadcast to
            `[batch, heads, query_len, key_len]` by the rules of `F.scaled_dot_product_attention`; or a `BlockMask`.

    Raises:
        AttentionProviderError: the shape does not broadcast, or the mask is an integer tensor or no tensor.
    """
    if mask is None:
        return MaskKind.NONE, None
    if not isinstance(mask, torch.Tensor):
        if type(mask).__name__ == "BlockMask":
            return MaskKind.BLOCK, mask
        raise AttentionProviderError(
            f"attn_mask is a {type(mask).__name__}; a torch.Tensor, a flex_attention BlockMask or None is accepted."
        )
    check_dtype(mask)
    given = tuple(mask.shape)
    if not 1 <= mask.ndim <= 4:
        raise _does_not_broadcast(given, batch, heads, query_len, key_len)
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    for dim, size in enumerate((batch, heads, query_len, key_len)):
        if mask.shape[dim] == 1:
            continue
        if mask.shape[dim] != size:
            raise _does_not_broadcast(given, batch, heads, query_len, key_len)
        if dim in (1, 2) and size and mask.stride(dim) == 0 and not mask.requires_grad:
            mask = mask.narrow(dim, 0, 1)
    additive = mask.dtype != torch.bool
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        return (MaskKind.KEY_BIAS if additive else MaskKind.KEY), mask
    return (MaskKind.BIAS if additive else MaskKind.DENSE), mask


def check_dtype(mask: torch.Tensor) -> None:
    """Raises AttentionProviderError if `mask` is neither bool nor floating."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise AttentionProviderError(
            f"attn_mask has dtype {mask.dtype}; torch.bool (True takes part) and floating types (added to the scores) "
            "are accepted. For a 0/1 integer mask pass `mask.bool()`."
        )


def _does_not_broadcast(
    given: tuple[int, ...], batch: int, heads: int, query_len: int, key_len: int
) -> AttentionProviderError:
    return AttentionProviderError(
        f"attn_mask has shape {list(given)}, which does not broadcast to [batch, heads, query_len, key_len] = "
        f"{[batch, heads, query_len, key_len]}. A key mask is [batch, 1, 1, key_len]: for [batch, key_len] pass "
        "`mask[:, None, None, :]`."
    )


def causal(query_len: int, key_len: int, device: torch.device) -> torch.Tensor:
    """The mask that `is_causal` means in PyTorch, aligned to the top left: bool `[query_len, key_len]`."""
    return torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril()


def and_causal(mask: torch.Tensor, query_len: int, key_len: int) -> torch.Tensor:
    """`mask` (a 4-D view from `classify`) combined with `is_causal`; bool stays bool, floating stays floating."""
    lower = causal(query_len, key_len, mask.device)
    return mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, float("-inf"))


def dead_rows(mask: torch.Tensor) -> torch.Tensor:
    """The rows without a key: bool `[batch | 1, heads | 1, query | 1, 1]`. Their output is zero and their lse -inf."""
    visible = mask if mask.dtype == torch.bool else mask != float("-inf")
    return ~visible.any(dim=-1, keepdim=True)


def as_bias(mask: torch.Tensor, dead: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`mask` as an additive bias of `dtype` under which no row is fully masked.

    Kernels divide zero by zero in a fully masked row, and the NaN reaches gradients even if the output is cleared. So
    `dead` rows (None: there are none) attend to all keys in this bias, and the caller clears their output.
    """
    lifted = mask if dead is None else without_dead_rows(mask, dead)
    if mask.dtype != torch.bool:
        return lifted.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~lifted, float("-inf"))


def without_dead_rows(mask: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """`mask` with all keys visible in its `dead` rows, as kernels need it."""
    # For a bool mask: where a row is live, mask != False is the mask; where it is dead, False != True is True.
    return mask != dead if mask.dtype == torch.bool else mask.masked_fill(dead, 0.0)
