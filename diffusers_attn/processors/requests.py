"""Detects requests to diffusers' own attention that conflict with a provider.

`model.set_attention_backend(...)` and `model.enable_parallelism(...)` store a request in attributes of a model's
processors, which pass it on in each attention call. Such requests are refused when a model is bound to a provider, and
when they are stored in a bound processor, before a pipeline has computed anything. (`entry_points.py` checks the calls
again.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..scope import ProviderChoice, active_choice
from .entry_points import backend_refused, parallelism_refused

BACKEND, PARALLEL = "_attention_backend", "_parallel_config"


def is_flex(backend: Any) -> bool:
    """Whether this backend is "flex", which models with a BlockMask need and which is also a provider."""
    return str(getattr(backend, "value", backend)).lower() == "flex"


def check_request(name: str, value: Any, choice: ProviderChoice | None) -> None:
    """Raises AttentionProviderError if setting this attribute on a processor bound to `choice` is such a request."""
    if name in (BACKEND, PARALLEL) and value is not None:
        if name == PARALLEL:
            raise parallelism_refused(active_choice(choice))
        if not is_flex(value):
            raise backend_refused(value, active_choice(choice))


def check_requests(model: nn.Module | None, processors: Iterable[Any], choice: ProviderChoice | None = None) -> None:
    """Raises AttentionProviderError if processors, or their model, have requests that conflict with `choice`."""
    processors = list(processors)
    all_support_backends = all(hasattr(each, BACKEND) for each in processors)
    for each in processors:
        backend = getattr(each, BACKEND, None)
        if is_flex(backend) and (all_support_backends or is_flex(getattr(type(each), BACKEND, None))):
            backend = None
        if backend is not None:
            raise backend_refused(backend, active_choice(choice))
        check_request(PARALLEL, getattr(each, PARALLEL, None), choice)
    own = getattr(model, PARALLEL, None)
    check_request(PARALLEL, getattr(own, "context_parallel_config", None), choice)
