"""Calls with tensors that are not plain: made plain, passed to PyTorch, or refused. `tensor_kinds` says which."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import tensor_kinds
from .call import AttentionCall
from .providers.native import scaled_dot_product_attention
from .tensor_kinds import Way


def serve_not_plain(call: AttentionCall, is_split: bool, serve_plain: Callable[[AttentionCall], Tensor]) -> Tensor:
    """The result of a call whose `not_plain` names an argument.

    Args:
        is_split: whether the tokens of the model are split over ranks.
        serve_plain: serves the same call with plain tensors.

    Raises:
        AttentionProviderError: no provider serves a call with such tensors.
    """
    assert call.not_plain is not None
    argument, kind = call.not_plain
    query, key, value, mask = call.query, call.key, call.value, call.mask
    if kind.way == Way.OWN:
        given: tuple[Any, ...] = query, key, value, mask
        owner = next(each for each in given if hasattr(each, "attention"))
        return owner.attention(call._replace(not_plain=None), serve_plain)
    if kind.way == Way.STRIPPED:
        query, key, value, plain_mask = (tensor_kinds.stripped(each) for each in (query, key, value, mask))
        out = serve_plain(call._replace(query=query, key=key, value=value, mask=plain_mask))
        return tensor_kinds.labelled_as(out, call.query, call.key, call.value, mask)
    if kind.way == Way.CAUSAL:
        if argument != "attn_mask":
            raise tensor_kinds.refused(argument, kind, "which is a mask", "pass it as attn_mask")
        if is_split and not tensor_kinds.is_upper_left(mask):
            raise tensor_kinds.refused(
                argument, kind, "aligned to the lower right, and the tokens of this call are split over ranks",
                "pass the bool mask of the full sequence instead",
            )  # fmt: skip
        mask = tensor_kinds.causal(mask, call.is_causal, query.device)
        return serve_plain(call._replace(mask=mask, is_causal=mask is None))
    if kind.way == Way.REFUSED:
        raise tensor_kinds.refused(argument, kind, tensor_kinds.NOBODY)
    if is_split:
        raise tensor_kinds.refused(argument, kind, "and the tokens of this call are split over ranks")
    if call.provider not in ("native", "auto"):
        raise tensor_kinds.refused(
            argument, kind, f"and provider '{call.provider}' takes plain tensors",
            "use provider 'native', which passes it to PyTorch",
        )  # fmt: skip
    sdpa = functools.partial(
        scaled_dot_product_attention, attn_mask=mask, dropout_p=call.dropout_p, is_causal=call.is_causal,
        scale=call.scale, enable_gqa=call.enable_gqa,
    )  # fmt: skip
    if call.layout == "bhsd":
        return sdpa(query, key, value)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if kind is tensor_kinds.NESTED and type(query) is Tensor:
        # PyTorch accepts a nested tensor that is no subclass only if it is contiguous.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return sdpa(query, key, value).transpose(1, 2)
