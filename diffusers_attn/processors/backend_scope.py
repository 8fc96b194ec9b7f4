"""Detects diffusers' `with attention_backend(...)` around a model that is bound to another provider.

The scope sets diffusers' backend for all attention inside it. A bound model does not use diffusers' dispatcher and
would ignore the scope. So open scopes are recorded here, and calls compare the innermost one with their provider.
diffusers' own record of the active backend does not suffice, since `model.set_attention_backend(...)` also changes it,
permanently.
"""

from __future__ import annotations

import functools
import gc
import sys
from types import FrameType, GeneratorType
from typing import Any

from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from ..errors import AttentionProviderError
from ..providers.registry import as_arguments
from ..scope import ProviderChoice, active_choice
from ..tracing.errors import raise_error

backends: list[str] = []
"""Backends of the open scopes, innermost last."""
_scopes: list[FrameType] = []
"""Frames of these scopes' calls of `attention_backend`."""


def install() -> None:
    """Records the scopes that are open now, and patches diffusers so that later ones are recorded."""
    code = attention_dispatch.attention_backend.__wrapped__.__code__  # type: ignore[attr-defined]
    upstream = _AttentionBackendRegistry.set_active_backend.__func__  # type: ignore[attr-defined]

    for each in gc.get_objects():  # each open scope is a generator, which diffusers itself keeps nowhere
        if type(each) is GeneratorType and each.gi_code is code and each.gi_suspended and each.gi_frame is not None:
            _scopes.append(each.gi_frame)
    innermost = _AttentionBackendRegistry._active_backend
    _scopes.sort(key=lambda frame: frame.f_locals["backend"] is innermost)
    backends.extend(frame.f_locals["backend"].value for frame in _scopes)

    @functools.wraps(upstream)
    def set_active_backend(cls: Any, backend: Any) -> None:
        upstream(cls, backend)
        frame = sys._getframe(1)
        if frame.f_code is not code:
            return
        # The scope calls this twice: on entry and on exit.
        place = next((i for i, each in enumerate(_scopes) if each is frame), None)
        if place is None:
            _scopes.append(frame)
            backends.append(str(getattr(backend, "value", backend)))
        else:
            del _scopes[place], backends[place]

    _AttentionBackendRegistry.set_active_backend = classmethod(set_active_backend)  # type: ignore[assignment, method-assign]


def check_scope(bound: ProviderChoice | None) -> None:
    """Raises AttentionProviderError if the innermost scope of diffusers names another backend than the provider of a
    call bound to `bound` (None: the provider of the active scope). Requires an open scope."""
    provider = active_choice(bound).provider
    if backends[-1] != provider:
        raise_error(_refused, backends[-1], provider)


def _refused(name: str, provider: str) -> AttentionProviderError:
    return AttentionProviderError(
        f"with attention_backend('{name}') is active, but the model's attention is bound to provider '{provider}'. For "
        f"another provider in a scope, write with attention_provider({as_arguments(name)}); to keep '{provider}', call "
        "the model outside of attention_backend; for diffusers' own backends, call set_attention_provider(model, None) "
        "first."
    )
