"""The calls just before: a call like one of them is recognised by one check in C++ instead of one read per property.

The check is Dynamo's own guard on tensors, which is private to PyTorch and touched here alone. It compares type,
dispatch keys (so autocast, functorch and dispatch modes too), dtype, device, requires_grad, sizes and strides: more
than a decision depends on, so that what it lets pass is served as before. What it turns away is looked up, or decided,
in the ordinary way. So are tensors that require a gradient (whether it is wanted depends on the grad mode, which the
check does not see) and one tensor given twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

if TYPE_CHECKING:
    from .dispatch import PreparedCall
    from .scope import ProviderChoice

MOST = 4
"""kinds of calls that alternate in one model: self- and cross-attention, and again for another length."""


class CachedCall(NamedTuple):
    """A kind of call, and how it was served."""

    matches: Callable[..., bool]
    """of query, key, value and, if there is one, the mask."""
    arguments: tuple[object, ...]
    """what is no tensor: layout, dropout_p, is_causal, scale, enable_gqa."""
    attention: Callable[..., Tensor]
    transpose: bool
    mask_view: Callable[[Any], Any] | None


def remember(
    choice: ProviderChoice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    arguments: tuple[object, ...],
    served: PreparedCall,
) -> None:
    """Puts a call before the others that `choice` served. No tensor is kept, nor kept alive."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    # Of plain tensors alone: of others, the check may read what they do not have.
    if any(type(tensor) is not Tensor or tensor.requires_grad for tensor in tensors):
        return
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    latest = CachedCall(guards.check, arguments, *served)
    # One assignment, so that another thread sees either the old tuple or the new one.
    if mask is None:
        choice.cached = (latest, *choice.cached[: MOST - 1])
    else:
        choice.cached_masked = (latest, *choice.cached_masked[: MOST - 1])
