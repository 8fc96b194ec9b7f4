"""The entry of every attention call: finds the active provider, decides how it serves the call, and calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import masks, shapes, tensor_kinds
from .context_parallel.sequences.active import active
from .errors import AttentionProviderError
from .providers import lowering, registry
from .providers.decision import decide_constant
from .providers.selection import Selection, select
from .providers.serving import AttentionCall, Serving
from .recompute import in_backward_id
from .scope import NATIVE, ProviderChoice, active_choice, active_parallel, scope, scope_in_backward
from .shapes import Layout
from .tensor_kinds import Kind, Way, no_transform

if TYPE_CHECKING:
    from .context_parallel.sequences.tracker import SequenceTracker

# Looked up once: the overhead of a call is a few microseconds, and every attribute lookup counts.
_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_strided = torch.strided
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
    tracker = active.tracker  # not None in a model whose tokens are split over ranks
    found = sizes = None
    if tracing:
        found = tensor_kinds.traced(query, key, value, attn_mask)
    else:
        if not ((is_causal is False or is_causal is True) and (enable_gqa is False or enable_gqa is True)):
            is_causal, enable_gqa = _flag("is_causal", is_causal), _flag("enable_gqa", enable_gqa)
        # Almost all calls have plain tensors, and need no closer look.
        if (
            type(query) is type(key) is type(value) is Tensor
            and query.layout is key.layout is value.layout is _strided
            and (attn_mask is None or (type(attn_mask) is Tensor and attn_mask.layout is _strided))
            and no_transform()
        ):
            try:
                sizes = query.shape, key.shape, value.shape, None if attn_mask is None else attn_mask.shape
            except RuntimeError:  # a nested tensor of type torch.Tensor has no shape
                pass
        if sizes is None:
            found = tensor_kinds.of(query, key, value, attn_mask)
            if found is None:
                sizes = query.shape, key.shape, value.shape, getattr(attn_mask, "shape", None)
    if found is not None and found[1].way not in (Way.ANY, Way.DERIVED):
        return _attend_unusual(
            choice, found, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, tracker
        )
    if _any_autocast_enabled():
        query, key, value = _autocast(query, key, value)
    if tracker is not None:
        out = _attend_split(
            choice, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, tracker, found
        )
        if out is not None:
            return out
    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and (query.requires_grad or key.requires_grad or value.requires_grad)
    prepared = signature = None
    if sizes is not None:
        dtype, device = query.dtype, query.device
        if dtype is key.dtype is value.dtype and device == key.device == value.device:
            # Everything that a decision or a check can depend on.
            mask: object = type(attn_mask)
            if isinstance(attn_mask, Tensor):
                requires_grad = grad_enabled and attn_mask.requires_grad
                mask = attn_mask.dtype, attn_mask.device, attn_mask.stride(), requires_grad
            signature = (
                choice, layout, sizes, dtype, device, dropout_p, is_causal, scale, enable_gqa, needs_grad, mask
            )  # fmt: skip
            prepared = _prepared.get(signature)
    if prepared is None:
        derived = found is not None and found[1].way == Way.DERIVED
        prepared = _prepare(
            choice, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout, needs_grad, derived
        )
        if signature is not None:
            if len(_prepared) >= _PREPARED_MAX:
                _prepared.clear()
            _prepared[signature] = prepared
    attention, transpose, view = prepared
    if transpose:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is None:
        out = attention(query, key, value)
    else:
        out = attention(query, key, value, attn_mask if view is None else view(attn_mask))
    return out.transpose(1, 2) if transpose else out


class PreparedCall(NamedTuple):
    """How to serve a kind of call."""

    attention: Callable[..., Tensor]
    """Called with query, key, value and, if there is one, the mask."""
    transpose: bool
    """Whether the kernel takes the other layout."""
    mask_view: Callable[[Any], Any] | None
    """Gives the mask the four dimensions that adapters expect; None if it has them."""


def _serve(prepared: PreparedCall, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None) -> Tensor:
    attention, transpose, view = prepared
    if transpose:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is None:
        out = attention(query, key, value)
    else:
        out = attention(query, key, value, attn_mask if view is None else view(attn_mask))
    return out.transpose(1, 2) if transpose else out


def _flag(name: str, value: object) -> bool:
    """`value` as a bool. A 1 is refused, as PyTorch refuses it: it equals True, so a cached call would accept it."""
    if isinstance(value, (bool, torch.SymBool)):
        return bool(value)
    raise AttentionProviderError(f"{name}={value!r} was given; True or False is accepted.")


def _attend_unusual(
    choice: ProviderChoice,
    found: tuple[str, Kind],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: Layout,
    tracker: SequenceTracker | None,
) -> Tensor:
    """Serves a call with tensors that are not plain: makes them plain, passes them to PyTorch, or refuses them."""
    argument, kind = found
    attend_plain = functools.partial(
        attend, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, layout=layout, bound=choice, scoped=False
    )
    if kind.way == Way.STRIPPED:
        plain = [tensor_kinds.stripped(each) for each in (query, key, value, attn_mask)]
        return tensor_kinds.labelled_as(attend_plain(*plain, is_causal=is_causal), query, key, value, attn_mask)
    split = tracker is not None and tracker.is_split
    if kind.way == Way.CAUSAL:
        if argument != "attn_mask":
            raise tensor_kinds.refused(argument, kind, "which is a mask", "pass it as attn_mask")
        if split and not tensor_kinds.is_upper_left(attn_mask):
            raise tensor_kinds.refused(
                argument, kind, "aligned to the lower right, and the tokens of this call are split over ranks",
                "pass the bool mask of the full sequence instead",
            )  # fmt: skip
        mask = tensor_kinds.causal(attn_mask, is_causal, query.device)
        return attend_plain(query, key, value, mask, is_causal=mask is None)
    if kind.way == Way.REFUSED:
        raise tensor_kinds.refused(argument, kind, tensor_kinds.NOBODY)
    if split:
        raise tensor_kinds.refused(argument, kind, "and the tokens of this call are split over ranks")
    if choice.provider not in ("native", "auto"):
        raise tensor_kinds.refused(
            argument, kind, f"and provider '{choice.provider}' takes plain tensors",
            "use provider 'native', which passes it to PyTorch",
        )  # fmt: skip
    from .providers.native import scaled_dot_product_attention

    sdpa = functools.partial(scaled_dot_product_attention, scale=scale, enable_gqa=enable_gqa)
    if layout == "bhsd":
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if kind is tensor_kinds.NESTED and type(query) is Tensor:
        # PyTorch accepts a nested tensor that is no subclass only if it is contiguous.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return sdpa(query, key, value, attn_mask, dropout_p, is_causal).transpose(1, 2)


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
    tracker: SequenceTracker,
    kind: tuple[str, Kind] | None,
) -> Tensor | None:
    """Attention over the ranks that share the sequence; None for a call that each rank serves by itself."""
    if not tracker.is_split:  # a part of the forward in which nothing is split
        return None
    from .context_parallel.attention.entry import split_attention

    shapes.check(query, key, value, enable_gqa, layout)
    seq = -2 if layout == "bhsd" else -3
    derived = None if kind is None or kind[1].way != Way.DERIVED else kind
    if derived is not None and tracker.attention(query.shape[seq], key.shape[seq]) is not None:
        raise tensor_kinds.refused(
            *derived, "and the tokens of this call are split over ranks",
            "compute such derivatives on one device, or with autograd's backward",
        )  # fmt: skip
    given = query, key, value
    if not query.ndim == key.ndim == value.ndim == 4:
        query, key, value, attn_mask = shapes.four_dims(query, key, value, attn_mask)
    heads = 1 if layout == "bhsd" else 2
    if shapes.differ(query, key, value, heads):
        query, key, value = shapes.broadcast(query, key, value, heads)
    if layout == "bhsd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = split_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, tracker=tracker, provider=choice.provider,
        options=choice.options, mesh=active_parallel(),
    )  # fmt: skip
    if out is None or layout == "bshd":
        return out
    out = out.transpose(1, 2)
    return out if given[0].ndim == given[1].ndim == given[2].ndim == 4 else shapes.as_given(out, *given)


_PREPARED_MAX = 4096
_prepared: dict[tuple[object, ...], PreparedCall] = {}


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts as autocast does for F.scaled_dot_product_attention; it does not cast the inputs of other kernels."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


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
    derived: bool = False,
) -> PreparedCall:
    """Checks a call and decides how it is served."""
    tensor_kinds.check_quantised(query, key, value)
    shapes.check(query, key, value, enable_gqa, layout)
    four_dims = query.ndim == key.ndim == value.ndim == 4
    given = query, key, value, attn_mask
    if not four_dims:
        query, key, value, attn_mask = shapes.four_dims(query, key, value, attn_mask)
    sizes = _sizes(query, key, value, layout)
    mask_kind, mask = masks.classify(attn_mask, *sizes)
    if not 0.0 <= dropout_p <= 1.0:
        raise AttentionProviderError(f"dropout_p={dropout_p} was given; a probability from 0 to 1 is accepted.")
    if isinstance(attn_mask, Tensor) and attn_mask.device != query.device:
        raise AttentionProviderError(
            f"attn_mask is on {attn_mask.device} and query on {query.device}; both must be on one device. "
            "Pass mask.to(query.device)."
        )
    if mask_kind in masks.ADDITIVE and mask.dtype not in (query.dtype, torch.float32):  # type: ignore[union-attr]
        raise AttentionProviderError(
            f"attn_mask has dtype {attn_mask.dtype} and the query {query.dtype}; torch.bool, torch.float32 and the "
            "query's dtype are accepted for attn_mask. Pass mask.to(query.dtype)."
        )
    call = AttentionCall.of(
        choice.provider, choice.options, query, key, value, layout=layout, mask_kind=mask_kind, is_causal=is_causal,
        needs_grad=needs_grad, dropout_p=dropout_p, bias_needs_grad=_bias_needs_grad(attn_mask, mask_kind),
        derived=derived,
    )  # fmt: skip
    plan = Serving(*decide_constant(choice.provider, *call))
    if 0 in sizes or value.shape[-1] == 0:
        plan = plan._replace(empty=True)
    if shapes.differ(query, key, value, 1 if layout == "bhsd" else 2):
        plan = plan._replace(broadcast=True)
    params = lowering.kernel_params(call, plan, scale, dropout_p)
    adapter = registry.ADAPTERS[plan.provider]
    view = None if mask is attn_mask else functools.partial(_view_mask, sizes=sizes)
    attention: Callable[..., Tensor]
    wants_derivative = params.needs_grad or derived
    if plan.provider == "native" and wants_derivative and plan.causal != "mask" and not plan.empty:
        # PyTorch chooses its kernel by the form of the tensors, and the kernel decides which derivatives exist (second
        # order, forward mode). So PyTorch receives the tensors in the form in which they were given.
        attention = adapter.bind(params._replace(gqa=enable_gqa))
        if not four_dims:
            ndim = max(tensor.ndim for tensor in given[:3])
            return PreparedCall(attention, False, functools.partial(_mask_of_dims, ndim=ndim))
        if plan.broadcast or (params.gqa and not enable_gqa) or (mask is not None and given[3].ndim == 3):
            return PreparedCall(attention, plan.layout != layout, None if view is None or given[3].ndim == 3 else view)
    if plan.lowers:
        attention = functools.partial(lowering.attention, adapter=adapter, plan=plan, params=params)
    else:
        attention = adapter.bind(params)
    prepared = PreparedCall(attention, plan.layout != layout, view)
    return prepared if four_dims else PreparedCall(functools.partial(_attend_four_dims, prepared), False, None)


def _attend_four_dims(
    prepared: PreparedCall, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None
) -> Tensor:
    """Serves a call that was prepared for 4-D tensors, with tensors of other dimensions."""
    return shapes.as_given(_serve(prepared, *shapes.four_dims(query, key, value, attn_mask)), query, key, value)


def _mask_of_dims(mask: Tensor, ndim: int) -> Tensor:
    """`mask` with 2 to `ndim` dimensions, as PyTorch accepts it with tensors of `ndim` dimensions."""
    while mask.ndim > ndim:
        mask = mask.squeeze(0)
    return mask.unsqueeze(0) if mask.ndim == 1 else mask


def _sizes(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[int, int, int, int]:
    """batch, heads, query_len, key_len."""
    heads, seq = (1, 2) if layout == "bhsd" else (2, 1)
    joint = shapes.joint
    return (
        joint(query.shape[0], key.shape[0], value.shape[0]),
        joint(query.shape[heads], key.shape[heads], value.shape[heads]),
        query.shape[seq],
        key.shape[seq],
    )


def _bias_needs_grad(attn_mask: Any, mask_kind: masks.MaskKind) -> bool:
    return mask_kind in masks.ADDITIVE and torch.is_grad_enabled() and attn_mask.requires_grad


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
    """Reports which provider `auto` would pick for a call, and why. Computes nothing.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, layout: as for `attend`.
        lossy: names of lossy providers that `auto` may pick too; default none.

    Returns:
        The selection, which prints as a short report.

    Raises:
        AttentionProviderError: no available provider serves the call. The message says why for each.
    """
    shapes.check(query, key, value, enable_gqa, layout)
    found = tensor_kinds.of(query, key, value, attn_mask)
    if found is not None and found[1].way == Way.CAUSAL:
        attn_mask = tensor_kinds.causal(attn_mask, is_causal, query.device)
        is_causal = attn_mask is None
    if not query.ndim == key.ndim == value.ndim == 4:
        query, key, value, attn_mask = shapes.four_dims(query, key, value, attn_mask)
    mask_kind, _ = masks.classify(attn_mask, *_sizes(query, key, value, layout))
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    options = ProviderChoice.of("auto", lossy=lossy).options
    call = AttentionCall.of(
        "auto", options, query, key, value, layout=layout, mask_kind=mask_kind, is_causal=is_causal,
        needs_grad=needs_grad, dropout_p=dropout_p, bias_needs_grad=_bias_needs_grad(attn_mask, mask_kind),
    )  # fmt: skip
    return select(call)


def _view_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Any:
    return masks.classify(mask, *sizes)[1]
