"""What a user may have asked of diffusers' own attention, which a provider takes the place of.

`model.set_attention_backend(...)` and `model.enable_parallelism(...)` leave a note in the processors of a model, which
each of their attention calls brings along. A call cannot go both ways. So these notes are looked for when a model is
bound to a provider, and refused when they are to be written on one that is bound: before a pipeline has computed
anything. (`entry_points.py` finds them once more, in the call itself.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..scope import ProviderChoice, active_choice
from .entry_points import backend_refused, parallelism_refused

BACKEND, PARALLEL = "_attention_backend", "_parallel_config"


def is_flex(backend: Any) -> bool:
    """Whether calls with this backend go to the provider of the same name, as models with a BlockMask want it."""
    return str(getattr(backend, "value", backend)).lower() == "flex"


def check_note(name: str, value: Any, choice: ProviderChoice | None) -> None:
    """Raises AttentionProviderError if an attribute that a bound processor is given is such a note."""
    if name in (BACKEND, PARALLEL) and value is not None:
        if name == PARALLEL:
            raise parallelism_refused(active_choice(choice))
        if not is_flex(value):
            raise backend_refused(value, active_choice(choice))


def check_notes(model: nn.Module | None, processors: Iterable[Any], choice: ProviderChoice | None = None) -> None:
    """Raises AttentionProviderError if such notes are in processors that are to be bound, or in their model."""
    processors = list(processors)
    know_backends = all(hasattr(each, BACKEND) for each in processors)
    for each in processors:
        backend = getattr(each, BACKEND, None)
        if is_flex(backend) and (know_backends or is_flex(getattr(type(each), BACKEND, None))):
            backend = None
        if backend is not None:
            raise backend_refused(backend, active_choice(choice))
        check_note(PARALLEL, getattr(each, PARALLEL, None), choice)
    own = getattr(model, PARALLEL, None)
    check_note(PARALLEL, getattr(own, "context_parallel_config", None), choice)
