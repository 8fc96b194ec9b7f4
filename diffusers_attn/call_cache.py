"""The latest kinds of calls. A call like one of them is served after a single check in C++.

The check is Dynamo's own guard on tensors, which is private to PyTorch and touched here alone. It compares type,
dispatch keys (so autocast, functorch and dispatch modes too), dtype, device, requires_grad, sizes and strides: more
than a decision depends on. A call that fails the check takes the ordinary way. So do calls whose tensors require a
gradient (the check does not see the grad mode) and calls that pass one tensor twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

MOST = 4
"""kinds of calls that alternate in one model: self- and cross-attention, and again for another length."""


class PreparedCall(NamedTuple):
    """How to serve a kind of call."""

    attention: Callable[..., Tensor]
    """of query, key, value and, if there is one, the mask."""
    transpose: bool
    """whether the kernel's layout is the other one."""
    mask_view: Callable[[Any], Any] | None
    """gives the mask the four dimensions that adapters expect; None where it has them."""


class CachedCall(NamedTuple):
    """A kind of call, the check that recognises it, and how to serve it."""

    matches: Callable[..., bool]
    """of query, key, value and, if there is one, the mask."""
    arguments: tuple[object, ...]
    """the arguments that are not tensors: layout, dropout_p, is_causal, scale, enable_gqa."""
    attention: Callable[..., Tensor]
    transpose: bool
    mask_view: Callable[[Any], Any] | None


def remembered(
    cached: tuple[CachedCall, ...], tensors: tuple[Any, ...], arguments: tuple[object, ...], prepared: PreparedCall
) -> tuple[CachedCall, ...]:
    """`cached` with one more kind of call in front, at most `MOST` in all. It keeps no tensor alive.

    Args:
        tensors: query, key, value and, if there is one, the mask.
    """
    # Plain tensors only: of others, the check may read what they do not have.
    if any(type(tensor) is not Tensor or tensor.requires_grad for tensor in tensors):
        return cached
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return CachedCall(guards.check, arguments, *prepared), *cached[: MOST - 1]
