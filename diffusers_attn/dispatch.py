"""The entry of every attention call: finds the active provider, describes the call, and has it served.

A call of a kind that was served before is served at once: `known_calls` recognises it. Otherwise the entry makes an
`AttentionCall`. It goes to `other_tensors` if its tensors are not plain, to `context_parallel.attention.entry` if the
tokens of the model are split over ranks, and to `prepared_call` in all other cases.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import known_calls, masks, tensor_kinds
from .call import AttentionCall
from .context_parallel.sequences.active import active
from .errors import AttentionProviderError
from .other_tensors import serve_not_plain
from .prepared_call import prepare
from .providers.selection import Selection, select
from .providers.serving import CallProperties
from .recompute import in_backward_id
from .scope import NATIVE, ProviderChoice, active_choice, active_parallel, scope, scope_in_backward
from .shapes import Layout
from .tensor_kinds import Way

# Looked up once: the overhead of a call is a few microseconds, and every attribute lookup counts.
_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_signature, _prepared = known_calls.signature, known_calls.prepared


def attention_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Computes attention with the active provider. A replacement for `F.scaled_dot_product_attention`.

    Args:
        query: `[..., heads, query_len, head_dim]`.
        key: `[..., kv_heads, key_len, head_dim]`.
        value: `[..., kv_heads, key_len, value_head_dim]`.
        attn_mask: a bool mask (True takes part) or a floating mask (added to the scores), broadcastable to
            `[..., heads, query_len, key_len]`; or a `CausalBias` of torch.nn.attention.bias; or a flex_attention
            `BlockMask`. A row without any key gives zeros.
        dropout_p: probability of dropping an attention weight, from 0 to 1.
        is_causal: query i sees keys up to i (aligned to the top left). May be combined with a mask.
        scale: factor of the scores; default `head_dim ** -0.5`.
        enable_gqa: allows `heads` to be a multiple of `kv_heads`.
        attention_kwargs: options of the active provider for this call, in addition to those it was chosen with. (Name
            and position of the argument are those of finetrainers.)

    Query, key and value have one dtype and one device. Tensors of other kinds (nested, `DTensor`, inside `torch.vmap`)
    are computed as PyTorch computes them if the provider can, and refused otherwise; see `tensor_kinds.py`.

    Returns:
        `[..., heads, query_len, value_head_dim]`, in the query's dtype.

    Raises:
        AttentionProviderError: the active provider cannot compute exactly this call. The message names providers that
            can.
    """
    if attention_kwargs:
        return attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout="bhsd",
            bound=active_choice().updated(**attention_kwargs), scoped=False,
        )  # fmt: skip
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout="bhsd")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: Layout,
    bound: ProviderChoice | None = None,
    scoped: bool = True,
) -> Tensor:
    """`attention_dispatch` for tensors in either layout, for a caller that is bound to a provider.

    Args:
        layout: layout of query, key, value and the result: "bhsd" is `[batch, heads, seq, head_dim]`, as in SDPA;
            "bshd" is `[batch, seq, heads, head_dim]`, as in diffusers' processors. `attn_mask` is
            `[batch, heads, query_len, key_len]` in both.
        bound: the provider of the caller, used if no scope overrides it; None is `native`.
        scoped: whether an `attention_provider` scope overrides `bound`.

    Raises:
        AttentionProviderError: as `attention_dispatch`.
    """
    tracing = _is_dynamo_compiling()
    choice = scope.choice if scoped else bound
    if choice is None:
        choice = (scoped and not tracing and in_backward_id() != -1 and scope_in_backward()[0]) or bound or NATIVE
    if not tracing:
        if active.tracker is None and not _any_autocast_enabled():
            signature = _signature(
                choice, layout, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )  # fmt: skip
            prepared = _prepared.get(signature)
            if prepared is not None:
                return prepared.serve(query, key, value, attn_mask)
        is_causal, enable_gqa = _flag("is_causal", is_causal), _flag("enable_gqa", enable_gqa)
    call = AttentionCall(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, choice.provider, choice.options
    )
    return _attend(call, choice)


def _attend(call: AttentionCall, choice: ProviderChoice) -> Tensor:
    """Serves a call by the provider of `choice`."""
    tracing = _is_dynamo_compiling()
    signature = None if tracing else _signature(choice, call.layout, *call[:8])
    tracker = active.tracker
    if tracker is not None and not tracker.is_split:  # a part of the forward in which nothing is split
        tracker = None
    if signature is None:
        found = tensor_kinds.traced(*call[:4]) if tracing else tensor_kinds.of(*call[:4])
        call = call._replace(not_plain=found)
        if found is not None and found[1].way not in (Way.ANY, Way.DERIVED):
            return serve_not_plain(call, tracker is not None, functools.partial(_attend, choice=choice))
    if _any_autocast_enabled():
        call = _autocast(call)
        signature = None if signature is None else _signature(choice, call.layout, *call[:8])
    call = call._replace(needs_grad=_needs_grad(call.query, call.key, call.value))
    if tracker is not None:
        from .context_parallel.attention.entry import split_attention
        from .context_parallel.sequences.local_keys import check_local_keys

        out = split_attention(call, tracker, active_parallel())
        if out is not None:
            return out
        call = check_local_keys(call, tracker)
    prepared = None if signature is None else _prepared.get(signature)
    if prepared is None:
        prepared = prepare(call)
        if signature is not None:
            known_calls.keep(signature, prepared)
    return prepared.serve(call.query, call.key, call.value, call.mask)


def _flag(name: str, value: object) -> bool:
    """`value` as a bool. A 1 is refused, as PyTorch refuses it."""
    if isinstance(value, (bool, torch.SymBool)):
        return bool(value)
    raise AttentionProviderError(f"{name}={value!r} was given; True or False is accepted.")


def _needs_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def _autocast(call: AttentionCall) -> AttentionCall:
    """Casts as autocast does for F.scaled_dot_product_attention; it does not cast the inputs of other kernels."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device) or call.query.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    return call._replace(query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    layout: Layout = "bhsd",
    lossy: str | tuple[str, ...] = (),
    source: str | None = None,
) -> Selection:
    """Reports which provider `auto` would pick for a call, and why. Computes nothing, but loads the provider's kernel.

    Args:
        query: `[batch, heads, query_len, head_dim]`, or as `layout` says.
        key: `[batch, kv_heads, key_len, head_dim]`.
        value: `[batch, kv_heads, key_len, value_head_dim]`.
        attn_mask: as for `attention_dispatch`.
        dropout_p: as for `attention_dispatch`.
        is_causal: as for `attention_dispatch`.
        enable_gqa: as for `attention_dispatch`.
        layout: "bhsd", or "bshd" for tensors `[batch, seq, heads, head_dim]`.
        lossy: names of lossy providers that `auto` may pick too; default none.
        source: "package" or "hub", as for `provider_status`.

    Returns:
        The selection, which prints as a short report.

    Raises:
        AttentionProviderError: no available provider serves the call. The message says why for each.
    """
    found = tensor_kinds.of(query, key, value, attn_mask)
    if found is not None and found[1].way == Way.CAUSAL:
        attn_mask = tensor_kinds.causal(attn_mask, is_causal, query.device)
        is_causal = attn_mask is None
    options = {"lossy": lossy} if source is None else {"lossy": lossy, "source": source}
    call = AttentionCall(
        query, key, value, attn_mask, dropout_p, is_causal, None, enable_gqa, layout, "auto",
        ProviderChoice.of("auto", **options).options, _needs_grad(query, key, value),
    )  # fmt: skip
    call.check()
    call = call.four_dims()
    mask_kind, _ = masks.classify(call.mask, *call.sizes())
    return select(CallProperties.of(call, mask_kind))
