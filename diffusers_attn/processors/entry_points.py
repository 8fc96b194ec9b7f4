"""Replacements for the two functions by which diffusers' processors call attention. Both call a provider.

Most processors call `dispatch_attention_fn` with tensors `[batch, seq, heads, head_dim]`; the others call
`F.scaled_dot_product_attention` with `[batch, heads, seq, head_dim]`. Every attention call passes through here, so rare
cases are detected by a cheap test and handled in functions of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

from ..call import AttentionCall
from ..context_parallel.sequences.active import active
from ..dispatch import attend
from ..errors import AttentionProviderError
from ..providers.native import scaled_dot_product_attention as sdpa
from ..providers.registry import as_arguments
from ..scope import ProviderChoice, active_choice
from .backend_scope import backends, check_scope

_FLEX = ProviderChoice.of("flex")


def dispatch_entry_point(bound: ProviderChoice | None) -> Callable[..., Tensor]:
    """The replacement of diffusers' `dispatch_attention_fn` for processors bound to `bound` (None: to the scope)."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: str | None = None,
        parallel_config: object = None,
    ) -> Tensor:
        """`diffusers.models.attention_dispatch.dispatch_attention_fn`, with the same arguments.

        Raises:
            AttentionProviderError: the provider cannot do exactly this, or the call asks for something that only
                diffusers' own dispatcher does.
        """
        if backends:
            check_scope(bound)
        # As in diffusers, a mask [batch, keys] is a key mask. (SDPA would read the dimensions as queries and keys.)
        if isinstance(attn_mask, Tensor) and attn_mask.ndim == 2 and _is_of_keys(attn_mask, query, key):
            attn_mask = attn_mask[:, None, None, :]
        if backend is not None or parallel_config is not None or attention_kwargs:
            choice = _requested(bound, backend, parallel_config, attention_kwargs)
            rest = dropout_p, is_causal, scale, enable_gqa
            return attend(query, key, value, attn_mask, *rest, layout="bshd", bound=choice, scoped=False)
        if _len_torch_function_stack() and _modes_intercept():
            call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, "bshd")
            return _through_modes(bound, call.in_layout("bhsd")).transpose(1, 2)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout="bshd", bound=bound)

    return dispatch_attention_fn


def _is_of_keys(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether `mask` has shape `[batch, keys]`, for these keys or, if they are split, for the keys of all ranks."""
    if mask.shape[0] != query.shape[0]:
        return False
    tracker = active.tracker
    if mask.shape[1] == key.shape[1] or tracker is None:
        return bool(mask.shape[1] == key.shape[1])
    call = tracker.attention(query.shape[1], key.shape[1])
    return call is not None and mask.shape[1] == call.keys.total


def sdpa_entry_point(bound: ProviderChoice | None) -> Callable[..., Tensor]:
    """The replacement of `F.scaled_dot_product_attention` for processors bound to `bound` (None: to the scope)."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`torch.nn.functional.scaled_dot_product_attention`, with the same arguments.

        Raises:
            AttentionProviderError: the provider cannot do exactly this.
        """
        if _len_torch_function_stack() and _modes_intercept():
            call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, "bhsd")
            return _through_modes(bound, call)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, layout="bhsd", bound=bound)

    return scaled_dot_product_attention


def _requested(
    bound: ProviderChoice | None,
    backend: str | None,
    parallel_config: object,
    attention_kwargs: Mapping[str, Any] | None,
) -> ProviderChoice:
    """The choice for a call with a backend, a parallel_config or attention_kwargs.

    Raises:
        AttentionProviderError: the request conflicts with the provider.
    """
    choice = active_choice(bound)
    if parallel_config is not None:
        raise parallelism_refused(choice)
    if backend == "flex":
        # Models with a BlockMask, which only flex accepts, have this backend in their code. If a user set it, it means
        # the same provider.
        choice = choice if choice.provider == "flex" else _FLEX
    elif backend is not None:
        raise backend_refused(backend, choice)
    return choice.updated(**attention_kwargs) if attention_kwargs else choice


def backend_refused(backend: str, choice: ProviderChoice) -> AttentionProviderError:
    """The error for a backend of diffusers and a provider on one model."""
    name = getattr(backend, "value", backend)
    return AttentionProviderError(
        f"set_attention_backend('{name}') was called on a model whose attention is bound to provider "
        f"'{choice.provider}'. To keep '{choice.provider}', call model.reset_attention_backend(); for diffusers' own "
        "backends, call set_attention_provider(model, None); for another provider, call "
        f"set_attention_provider(model, {as_arguments(str(name))})."
    )


def parallelism_refused(choice: ProviderChoice) -> AttentionProviderError:
    """The error for diffusers' own parallelism and a provider on one model."""
    return AttentionProviderError(
        f"enable_parallelism() was called on a model whose attention is bound to provider '{choice.provider}'. It "
        "needs diffusers' own attention, which exchanges keys and values between devices. Load the model again without "
        "this call, or restore diffusers' attention with set_attention_provider(model, None)."
    )


def _modes_intercept() -> bool:
    """Whether a torch function mode is active that may handle attention calls.

    The mode of `torch.set_default_device` and `with torch.device(...)` affects only the creation of tensors.
    """
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _through_modes(bound: ProviderChoice | None, call: AttentionCall) -> Tensor:
    """Calls `F.scaled_dot_product_attention` under the active torch function modes, and serves the calls they pass on.

    An example of such a mode is diffusers' guidance that skips attention scores: it replaces that function's result.
    """
    with _below_active_modes(_Serve(bound)):
        return sdpa(
            call.query, call.key, call.value, call.mask, call.dropout_p, call.is_causal, scale=call.scale,
            enable_gqa=call.enable_gqa,
        )  # fmt: skip


class _Serve(TorchFunctionMode):
    def __init__(self, bound: ProviderChoice | None) -> None:
        super().__init__()
        self.bound = bound

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return attend(*args, **kwargs, layout="bhsd", bound=self.bound) if func is sdpa else func(*args, **kwargs)


@contextlib.contextmanager
def _below_active_modes(mode: TorchFunctionMode) -> Iterator[None]:
    """Enters `mode` below all other modes, so that it handles a call last."""
    active = _pop_all_modes()
    for each in (mode, *active):
        _push_mode(each)
    try:
        yield
    finally:
        _pop_all_modes()
        for each in active:
            _push_mode(each)


def _pop_all_modes() -> list[TorchFunctionMode]:
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]
