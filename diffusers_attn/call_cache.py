"""A cache of the latest kinds of calls: a call like one of them is served after a single check in C++.

The check is Dynamo's guard on tensors. It is private to PyTorch and used only in this file. It compares type, dispatch
keys (which include autocast, functorch and dispatch modes), dtype, device, requires_grad, sizes and strides, which is
more than a decision depends on. A call that fails the check takes the ordinary path. So does a call whose tensors
require a gradient (the check does not see the grad mode), and a call that passes one tensor twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

MOST = 4
"""Kinds of calls that are kept: self- and cross-attention alternate in one model, each with two lengths."""


class PreparedCall(NamedTuple):
    """How to serve a kind of call."""

    attention: Callable[..., Tensor]
    """Called with query, key, value and, if there is one, the mask."""
    transpose: bool
    """Whether the kernel takes the other layout."""
    mask_view: Callable[[Any], Any] | None
    """Gives the mask the four dimensions that adapters expect; None if it has them."""


class CachedCall(NamedTuple):
    """A kind of call, the check that recognises it, and how to serve it."""

    matches: Callable[..., bool]
    """Called with query, key, value and, if there is one, the mask."""
    arguments: tuple[object, ...]
    """The arguments that are not tensors: layout, dropout_p, is_causal, scale, enable_gqa."""
    attention: Callable[..., Tensor]
    transpose: bool
    mask_view: Callable[[Any], Any] | None


def remembered(
    cached: tuple[CachedCall, ...], tensors: tuple[Any, ...], arguments: tuple[object, ...], prepared: PreparedCall
) -> tuple[CachedCall, ...]:
    """`cached` with one more kind of call in front, at most `MOST` in total. It keeps no tensor alive.

    Args:
        tensors: query, key, value and, if there is one, the mask.
    """
    # Plain tensors only: the check may read attributes that other tensors do not have.
    if any(type(tensor) is not Tensor or tensor.requires_grad for tensor in tensors):
        return cached
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return CachedCall(guards.check, arguments, *prepared), *cached[: MOST - 1]
