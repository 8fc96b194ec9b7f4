"""How a call that one rank serves by itself reaches the kernel: decided once, for all calls of the same kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import masks, shapes, spans
from .call import AttentionCall
from .providers import lowering
from .providers.decision import decide_call


class PreparedCall(NamedTuple):
    """How to serve a kind of call."""

    attention: Callable[..., Tensor]
    """Called with query, key, value and, if there is one, the mask."""
    transpose: bool
    """Whether the kernel takes the other layout."""
    mask_view: Callable[[Any], Any] | None
    """Gives the mask the dimensions that `attention` expects; None if it has them."""

    def serve(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
        """Computes a call of this kind. Takes and returns tensors in the layout of the call."""
        attention, transpose, view = self
        if transpose:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if mask is None:
            out = attention(query, key, value)
        else:
            out = attention(query, key, value, mask if view is None else view(mask))
        return out.transpose(1, 2) if transpose else out


def prepare(given: AttentionCall) -> PreparedCall:
    """Checks a call and decides how it is served.

    Raises:
        AttentionProviderError: the call is not valid, or the provider does not serve it.
    """
    prepared, provider = _prepare(given)
    if spans.is_on():
        named = spans.within(prepared.attention, spans.ATTENTION, provider, spans.ONE_RANK)
        return prepared._replace(attention=named)
    return prepared


def _prepare(given: AttentionCall) -> tuple[PreparedCall, str]:
    """The prepared call, and the name of its provider."""
    given.check()
    call = given.four_dims()
    sizes = call.sizes()
    mask_kind, mask = masks.classify(call.mask, *sizes)
    serving, params = decide_call(call, mask_kind)
    if 0 in sizes or call.value.shape[-1] == 0:
        serving = serving._replace(empty=True)
    if shapes.differ(call.query, call.key, call.value, call.heads_dim):
        serving = serving._replace(broadcast=True)
    adapter = serving.adapter
    view = None if mask is call.mask else functools.partial(_view_mask, sizes=sizes)
    transpose = serving.layout != call.layout
    differentiated = params.needs_grad or call.derived
    attention: Callable[..., Tensor]
    if serving.provider == "native" and differentiated and serving.causal != "mask" and not serving.empty:
        # PyTorch chooses its kernel by the form of the tensors, and the kernel decides which derivatives exist (second
        # order, forward mode). So PyTorch receives the tensors in the form in which they were given.
        attention = adapter.bind(params._replace(gqa=call.enable_gqa))
        if not given.has_four_dims:
            ndim = max(given.query.ndim, given.key.ndim, given.value.ndim)
            return PreparedCall(attention, False, functools.partial(_mask_of_dims, ndim=ndim)), serving.provider
        as_given = mask is not None and given.mask.ndim == 3
        if serving.broadcast or (params.gqa and not call.enable_gqa) or as_given:
            return PreparedCall(attention, transpose, None if as_given else view), serving.provider
    if serving.lowers:
        attention = functools.partial(lowering.attention, adapter=adapter, serving=serving, params=params)
    else:
        attention = adapter.bind(params)
    prepared = PreparedCall(attention, transpose, view)
    if given.has_four_dims:
        return prepared, serving.provider
    return PreparedCall(functools.partial(_serve_four_dims, prepared), False, None), serving.provider


def _serve_four_dims(prepared: PreparedCall, query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
    """Serves a call that was prepared for tensors of four dimensions, with tensors of other dimensions."""
    out = prepared.serve(*shapes.four_dims(query, key, value, mask))
    return shapes.as_given(out, query, key, value)


def _mask_of_dims(mask: Tensor, ndim: int) -> Tensor:
    """`mask` with 2 to `ndim` dimensions, as PyTorch accepts it with tensors of `ndim` dimensions."""
    while mask.ndim > ndim:
        mask = mask.squeeze(0)
    return mask.unsqueeze(0) if mask.ndim == 1 else mask


def _view_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Any:
    return masks.classify(mask, *sizes)[1]
