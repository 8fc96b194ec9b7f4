"""Decides how the active provider serves a call, before anything runs.

The provider serves the call exactly, or the call is refused with a reason and the names of the providers that can.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ..call import AttentionCall
from ..errors import AttentionProviderError
from ..logs import debugging
from ..masks import MaskKind
from . import registry
from .base import Params
from .catalog import SPECS
from .hub import PACKAGE, chosen_source, source_of
from .selection import select
from .serving import CallProperties, Serving, refusal, serving_of

log = logging.getLogger(__name__)


def decide_call(
    call: AttentionCall, mask_kind: MaskKind, *, partial: bool = False, compare_lengths: bool = True
) -> tuple[Serving, Params]:
    """How the provider of a call serves it, and the constants for the kernel. The call has four dimensions.

    Args:
        mask_kind, partial, compare_lengths: as for `CallProperties.of`.

    Raises:
        ProviderUnavailableError, AttentionProviderError: as `decide`.
    """
    properties = CallProperties.of(call, mask_kind, partial=partial, compare_lengths=compare_lengths)
    serving = Serving(*decide_constant(call.provider, *properties))
    if call.scale is None:
        true_scale = float(properties.head_dim) ** -0.5 if properties.head_dim else 1.0
    else:
        true_scale = float(call.scale)
    params = Params(
        mask_kind=serving.mask_kind,
        is_causal=call.is_causal and serving.causal != "mask",
        scale=true_scale,
        default_scale=call.scale is None and not serving.pad_head_dim,
        dropout_p=call.dropout_p,
        gqa=properties.heads != properties.kv_heads and not serving.repeat_kv,
        device_type=properties.device.type,
        options=call.options,
        needs_grad=properties.needs_grad or properties.bias_needs_grad,
        derived=properties.derived,
    )
    return serving, params


def decide(provider: str, properties: CallProperties) -> Serving:
    """How `provider` serves a call with these `properties`.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine. The message says how to install it.
        AttentionProviderError: the provider cannot serve this call exactly. The message names those that can.
    """
    if provider == "auto" and properties.device.type == "meta":
        provider = "native"
    if provider == "auto":
        return select(properties).serving
    status = registry.provider_status(provider, chosen_source(SPECS[provider], properties.options))
    if not status.available:
        raise registry.unavailable(status)
    reason = refusal(SPECS[provider], properties)
    if reason:
        others = ", ".join(name for name in able_providers(properties) if name != provider)
        instead = f"Providers available here that support it: {others}."
        instead = instead if others else "No provider available here supports this call."
        raise AttentionProviderError(
            f"attention provider '{provider}' cannot serve this call: {reason}. The call: {properties}. {instead}"
        )
    # On the meta device there is nothing to compute: PyTorch's own function returns the shape.
    return serving_of(SPECS["native" if properties.device.type == "meta" else provider], properties)


# Dynamo calls this while it traces and takes the result, plain values, as constants: decisions cost nothing in a graph.
# The cache is inside because Dynamo ignores a cache around a function that it traces.
@torch._dynamo.assume_constant_result
def decide_constant(provider: str, *properties: Any) -> tuple[Any, ...]:
    """The fields of `decide(provider, CallProperties(*properties))`, decided once per kind of call."""
    return _decided(provider, *properties)


@functools.lru_cache(maxsize=1024)
def _decided(provider: str, *properties: Any) -> tuple[Any, ...]:
    call = CallProperties(*properties)
    found = decide(provider, call)
    if debugging():
        why = select(call).reason if provider == "auto" and call.device.type != "meta" else "named"
        source = "" if found.source == PACKAGE else f" from the {found.source}"
        log.debug("attention by %s%s (%s): %s%s", found.provider, source, why, call, _lowerings(found))
    return tuple(found)


_CAUSAL = {
    "mask": "causality merged into the mask",
    "drop_keys": "keys that no query sees dropped",
    "two_calls": "causality in two calls of the kernel",
}


def _lowerings(serving: Serving) -> str:
    """The changes with which a kernel serves a call, in words."""
    words = ["key heads repeated"] * serving.repeat_kv
    words += [f"head_dim padded to {serving.pad_head_dim}"] * (serving.pad_head_dim > 0)
    words += [_CAUSAL[each] for each in (serving.causal,) if each in _CAUSAL]
    return f"; {', '.join(words)}" if words else ""


def able_providers(properties: CallProperties) -> list[str]:
    """The available providers that serve a call with these `properties` without its options. Downloads nothing."""
    able = []
    for status in registry.list_providers():
        if status.available:
            spec = SPECS[status.name]
            source = source_of(spec)
            if source == PACKAGE or (status.name, source) in registry.ADAPTERS:
                able += [status.name] * (not refusal(spec, properties._replace(options=(("source", source),))))
    return able
