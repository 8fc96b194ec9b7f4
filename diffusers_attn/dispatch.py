"""Every attention call comes through here: find the provider that is active, decide, call its kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import masks
from .context_parallel.running import running
from .errors import AttentionProviderError
from .masks import MaskKind
from .providers import lowering, registry, speeds
from .providers.base import Layout, Params
from .providers.decision import Call, Plan, decide
from .providers.selection import Selection, select
from .recent import remember
from .recompute import in_backward_id
from .scope import NATIVE, ProviderChoice, active_parallel, scope, scope_in_backward

if TYPE_CHECKING:
    from .context_parallel.streams import Streams

# Looked up once: a call's own cost is a few microseconds, and each attribute is a part of it.
_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def attention_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, through the active provider. May take its place.

    Args:
        query: `[..., heads, query_len, head_dim]`.
        key: `[..., kv_heads, key_len, head_dim]`.
        value: `[..., kv_heads, key_len, value_head_dim]`.
        attn_mask: bool (True takes part) or floating (added), broadcastable to `[..., heads, query_len, key_len]`; or a
            flex_attention `BlockMask`. A row without any key gives zeros.
        dropout_p: probability of dropping a weight.
        is_causal: query i sees keys up to i (aligned to the top left). May be combined with a mask.
        scale: of the scores; default `head_dim ** -0.5`.
        enable_gqa: allow `heads` to be a multiple of `kv_heads`.

    Returns:
        `[..., heads, query_len, value_head_dim]`.

    Raises:
        AttentionProviderError: the active provider cannot do exactly this; says who can.
    """
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
    """`attention_dispatch` for 4-D tensors in either layout, for a caller bound to a provider.

    Args:
        layout: of query, key, value and the result: "bhsd" `[batch, heads, seq, head_dim]`, as SDPA has it, or "bshd",
            as diffusers' processors do. `attn_mask` is `[batch, heads, query_len, key_len]` in both.
        bound: the caller's provider, where no scope overrides it.
        scoped: whether a scope overrides it.
    """
    tracing = _is_dynamo_compiling()
    choice = scope.choice if scoped else bound
    if choice is None:
        choice = (scoped and not tracing and in_backward_id() != -1 and scope_in_backward()[0]) or bound or NATIVE
    streams = running.streams  # not None in a model whose tokens are split over devices
    if streams is None and not tracing:
        # A call like one of the last: nothing to check or to decide. Inlined, since it is the path of almost all calls.
        if attn_mask is None:
            for matches, arguments, attention, transpose, _ in choice.recent:
                if matches(query, key, value) and arguments == (layout, dropout_p, is_causal, scale, enable_gqa):
                    if not transpose:
                        return attention(query, key, value)
                    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
        else:
            for matches, arguments, attention, transpose, view in choice.recent_masked:
                if matches(query, key, value, attn_mask) and arguments == (
                    layout, dropout_p, is_causal, scale, enable_gqa
                ):  # fmt: skip
                    if view is not None:
                        attn_mask = view(attn_mask)
                    if not transpose:
                        return attention(query, key, value, attn_mask)
                    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
                    return attention(query, key, value, attn_mask).transpose(1, 2)
    autocast = _any_autocast_enabled()
    if autocast:
        query, key, value = _autocast(query, key, value)
    rest = dropout_p, is_causal, scale, enable_gqa
    if streams is not None:
        out = _attend_split(choice, query, key, value, attn_mask, *rest, layout, streams)
        if out is not None:
            return out
    grad_enabled = torch.is_grad_enabled()
    needs_grad = grad_enabled and (query.requires_grad or key.requires_grad or value.requires_grad)
    if tracing or torch.compiler.is_compiling():
        prepared = _prepare(choice, query, key, value, attn_mask, *rest, layout, needs_grad)
    else:
        # All that a decision or a check could depend on.
        signature = (
            choice, layout, query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
            query.device, key.device, value.device, *rest, needs_grad,
            None if attn_mask is None else _mask_signature(attn_mask, grad_enabled),
        )  # fmt: skip
        before = _prepared.get(signature)
        if before is None:
            prepared = _prepare(choice, query, key, value, attn_mask, *rest, layout, needs_grad)
            if len(_prepared) >= _PREPARED_MAX:
                _prepared.clear()
            _prepared[signature] = prepared
        else:
            prepared = before
            if not autocast and streams is None:
                remember(choice, query, key, value, attn_mask, (layout, *rest), prepared)
    attention, transpose, view = prepared
    if transpose:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is None:
        out = attention(query, key, value)
    else:
        out = attention(query, key, value, attn_mask if view is None else view(attn_mask))
    return out.transpose(1, 2) if transpose else out


def _attend_split(
    choice: ProviderChoice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: Layout,
    streams: Streams,
) -> Tensor | None:
    """Attention over the ranks that share the sequence; None for a call that each rank can answer by itself."""
    if not streams.lengths or streams.mesh.size == 1:  # a part of the forward in which nothing is split
        return None
    from .context_parallel.call import split_attention

    if layout == "bhsd" and query.ndim == key.ndim == value.ndim != 4 and query.ndim >= 2:
        if streams.attention(query.shape[-2], key.shape[-2]) is None:
            return None
        return _attend_any_rank(
            choice, query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, scoped=False,
        )  # fmt: skip
    _check_tensors(query, key, value, enable_gqa, layout)
    if layout == "bhsd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = split_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, streams=streams, provider=choice.provider,
        options=choice.options, mesh=active_parallel(),
    )  # fmt: skip
    return out.transpose(1, 2) if out is not None and layout == "bhsd" else out


class Prepared(NamedTuple):
    """How to serve a kind of call."""

    attention: Callable[..., Tensor]
    """of query, key, value and, if there is one, the mask."""
    transpose: bool
    """whether the kernel's layout is the other one."""
    mask_view: Callable[[Any], Any] | None
    """gives the mask the four dimensions that adapters expect; None where it has them."""


_PREPARED_MAX = 4096
_prepared: dict[tuple[object, ...], Prepared] = {}


def _mask_signature(mask: Any, grad_enabled: bool) -> object:
    """All that `masks.classify` looks at, where the mask is, and whether it wants a gradient."""
    if not isinstance(mask, Tensor):
        return type(mask)
    shape = mask.shape
    requires_grad = grad_enabled and mask.requires_grad
    if len(shape) == 4 and shape[1] == shape[2] == 1:  # a key mask, whatever its strides
        return shape, mask.dtype, mask.device, requires_grad
    return shape, mask.dtype, mask.device, requires_grad, mask.stride()


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does around F.scaled_dot_product_attention; a kernel called by its own name is not covered."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _attend_any_rank(
    choice: ProviderChoice, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any
) -> Tensor:
    """SDPA's other forms: `[seq, head_dim]`, `[heads, seq, head_dim]`, and more than one batch dimension."""
    again: Callable[..., Tensor] = functools.partial(attend, **rest, layout="bhsd", bound=choice)
    if query.ndim < 4:
        lead = (None,) * (4 - query.ndim)
        out = again(query[lead], key[lead], value[lead], attn_mask)
        return out.reshape(out.shape[4 - query.ndim :])
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])

    def flat(tensor: Tensor) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[-3:]).flatten(0, -4)

    if isinstance(attn_mask, Tensor) and attn_mask.ndim > 3:
        attn_mask = flat(attn_mask)
    return again(flat(query), flat(key), flat(value), attn_mask).unflatten(0, batch)


def _prepare(
    choice: ProviderChoice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: Layout,
    needs_grad: bool,
) -> Prepared:
    """Checks a call and decides how it is served."""
    if layout == "bhsd" and query.ndim == key.ndim == value.ndim != 4 and query.ndim >= 2:
        again = functools.partial(
            _attend_any_rank, choice, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return Prepared(again, False, None)
    _check_tensors(query, key, value, enable_gqa, layout)
    sizes = _sizes(query, key, layout)
    mask_kind, mask = masks.classify(attn_mask, *sizes)
    if not 0.0 <= dropout_p <= 1.0:
        raise AttentionProviderError(f"dropout_p={dropout_p}: a probability, from 0 to 1, is accepted.")
    if isinstance(attn_mask, Tensor) and attn_mask.device != query.device:
        raise AttentionProviderError(
            f"attn_mask is on {attn_mask.device} and query on {query.device}: a kernel reads both, so they must be on "
            "one device. Pass mask.to(query.device)."
        )
    if mask_kind in masks.ADDITIVE and mask.dtype not in (query.dtype, torch.float32):  # type: ignore[union-attr]
        raise AttentionProviderError(
            f"attn_mask has dtype {attn_mask.dtype} beside a query of {query.dtype}; torch.bool, torch.float32 and the "
            "query's own dtype are accepted. Pass mask.to(query.dtype)."
        )
    call = _describe(query, key, value, attn_mask, mask_kind, dropout_p, is_causal, layout, needs_grad, choice.options)
    plan = Plan(*_decide(choice.provider, *call))
    if 0 in sizes:
        plan = plan._replace(empty=True)
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        plan = plan._replace(broadcast=True)
    params = Params(
        mask_kind=plan.mask_kind,
        is_causal=is_causal,
        scale=float(call.head_dim) ** -0.5 if scale is None else float(scale),
        default_scale=scale is None,
        dropout_p=dropout_p if call.dropout else 0.0,
        gqa=call.heads != call.kv_heads and not plan.repeat_kv,
        device_type=query.device.type,
        options=choice.options,
        needs_grad=needs_grad or call.bias_needs_grad,
    )
    adapter = registry.ADAPTERS[plan.provider]
    attention: Callable[..., Tensor]
    if plan.lowers:
        attention = functools.partial(lowering.attention, adapter=adapter, plan=plan, params=params)
    else:
        attention = adapter.bind(params)
    view = None if mask is attn_mask else functools.partial(_view_mask, sizes=sizes)
    return Prepared(attention, plan.layout != layout, view)


def _sizes(query: Tensor, key: Tensor, layout: Layout) -> tuple[int, int, int, int]:
    """batch, heads, query_len, key_len."""
    heads, seq = (1, 2) if layout == "bhsd" else (2, 1)
    return max(query.shape[0], key.shape[0]), query.shape[heads], query.shape[seq], key.shape[seq]


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    mask_kind: MaskKind,
    dropout_p: float,
    is_causal: bool,
    layout: Layout,
    needs_grad: bool,
    options: tuple[tuple[str, object], ...],
) -> Call:
    """What a decision depends on. Truths are spelled out: a comparison is symbolic in a dynamic graph."""
    heads = 1 if layout == "bhsd" else 2
    _, _, query_len, key_len = _sizes(query, key, layout)
    return Call(
        device=query.device,
        dtype=query.dtype,
        head_dim=_constant(query.shape[-1]),
        value_head_dim=_constant(value.shape[-1]),
        heads=_constant(query.shape[heads]),
        kv_heads=_constant(key.shape[heads]),
        query_len="equal" if query_len == key_len else "shorter" if query_len < key_len else "longer",
        long=True if key_len >= speeds.LONG else False,
        mask_kind=mask_kind,
        is_causal=is_causal,
        dropout=True if dropout_p > 0.0 else False,
        needs_grad=needs_grad,
        bias_needs_grad=mask_kind in masks.ADDITIVE and torch.is_grad_enabled() and attn_mask.requires_grad,
        options=options,
    )


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
) -> Selection:
    """What `auto` would pick for a call, and why; prints as a short report. Nothing is computed.

    Takes the arguments of `attend` that matter to a choice; `lossy` is the option of `auto`.

    Raises:
        AttentionProviderError: no usable provider serves the call; says why for each.
    """
    _check_tensors(query, key, value, enable_gqa, layout)
    mask_kind, _ = masks.classify(attn_mask, *_sizes(query, key, layout))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    options = ProviderChoice.of("auto", lossy=lossy).options
    return select(_describe(query, key, value, attn_mask, mask_kind, dropout_p, is_causal, layout, needs_grad, options))


def _view_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Any:
    return masks.classify(mask, *sizes)[1]


def _constant(size: int) -> int:
    """`size` as a number in a graph that is traced with symbolic sizes: heads and head_dim decide how a call is served.
    A range's length is what Dynamo specialises; in eager mode this is the identity."""
    return len(range(size))


# Dynamo calls this while tracing and takes its result, plain values, as constants: decisions cost nothing in a graph.
@torch._dynamo.assume_constant_result
def _decide(provider: str, *call: Any) -> tuple[Any, ...]:
    return tuple(decide(provider, Call(*call)))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, layout: Layout) -> None:
    """Raises AttentionProviderError where query, key and value do not belong together."""
    tensors = {"query": query, "key": key, "value": value}
    if any(tensor.ndim != 4 for tensor in tensors.values()):
        problem = f"query, key and value must have four dimensions, {list(layout)}"
    elif not query.device == key.device == value.device:
        problem = "query, key and value must be on one device"
    elif not query.dtype == key.dtype == value.dtype:
        problem = "query, key and value must have one dtype"
    else:
        heads, seq = (1, 2) if layout == "bhsd" else (2, 1)
        batch = max(query.shape[0], key.shape[0], value.shape[0])
        grouped = enable_gqa or key.shape[heads] == 1  # one key head for all is what broadcasting means anyway
        if any(tensor.shape[0] not in (1, batch) for tensor in tensors.values()):
            problem = "batch sizes must be equal (or one)"
        elif key.shape[seq] != value.shape[seq]:
            problem = "key and value must have one length"
        elif key.shape[heads] != value.shape[heads]:
            problem = "key and value must have one number of heads"
        elif query.shape[-1] != key.shape[-1]:
            problem = "query and key must have one head_dim"
        elif query.shape[heads] != key.shape[heads] and not grouped:
            problem = "query and key must have one number of heads, unless enable_gqa=True"
        else:
            return
    given = ", ".join(
        f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items()
    )
    raise AttentionProviderError(f"{problem}. Given (layout {layout}): {given}.")
