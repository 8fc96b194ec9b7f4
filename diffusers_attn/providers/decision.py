"""Decides how the active provider serves a call, before anything runs.

The provider serves the call exactly, or the call is refused with a reason and the names of the providers that can.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..errors import AttentionProviderError
from . import registry
from .catalog import SPECS
from .selection import select
from .serving import AttentionCall, Serving, plan, refusal


def decide(provider: str, call: AttentionCall) -> Serving:
    """How `provider` serves `call`.

    Raises:
        ProviderUnavailableError: the provider cannot be used on this machine. The message says how to install it.
        AttentionProviderError: the provider cannot serve this call exactly. The message names those that can.
    """
    if provider == "auto" and call.device.type == "meta":
        provider = "native"
    if provider == "auto":
        return select(call).plan
    status = registry.provider_status(provider)
    if not status.available:
        raise registry.unavailable(status)
    reason = refusal(SPECS[provider], call)
    if reason:
        others = ", ".join(name for name in able_providers(call) if name != provider)
        instead = f"Providers available here that support it: {others}."
        instead = instead if others else "No provider available here supports this call."
        raise AttentionProviderError(
            f"attention provider '{provider}' cannot serve this call: {reason}. The call: {call}. {instead}"
        )
    # On the meta device there is nothing to compute: PyTorch's own function returns the shape.
    return plan(SPECS["native" if call.device.type == "meta" else provider], call)


# Dynamo calls this while it traces and takes the result, plain values, as constants: decisions cost nothing in a graph.
# The cache is inside because Dynamo ignores a cache around a function that it traces.
@torch._dynamo.assume_constant_result
def decide_constant(provider: str, *call: Any) -> tuple[Any, ...]:
    """The fields of `decide(provider, AttentionCall(*call))`, decided once per kind of call. Works under Dynamo."""
    return _decided(provider, *call)


@functools.lru_cache(maxsize=1024)
def _decided(provider: str, *call: Any) -> tuple[Any, ...]:
    return tuple(decide(provider, AttentionCall(*call)))


def able_providers(call: AttentionCall) -> list[str]:
    """The available providers that serve `call` without its options."""
    call = call._replace(options=())
    usable = (status.name for status in registry.list_providers() if status.available)
    return [name for name in usable if not refusal(SPECS[name], call)]
