"""Names of attention calls and exchanges in a profile.

Nothing is named unless a profile runs (`runtime/profile`). Compiled graphs contain no names: `is_on` is False while
Dynamo traces, without a guard on the setting, so that a profile does not compile anything again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

PREFIX = "diffusers_attn"
SEPARATOR = "|"
ATTENTION, EXCHANGE, COMPONENT, ALL = "attention", "exchange", "component", "profile"
ONE_RANK = "one rank"
"""Strategy of a call that a rank serves by itself."""
BETWEEN_GROUPS = "groups of ranks"
"""Strategy of exchanges between groups that compute different branches of guidance, or different samples."""
_state = {"on": False}


def is_on() -> bool:
    """Whether calls are to be named."""
    return not torch.compiler.is_compiling() and _state["on"]


def switch(on: bool) -> None:
    """Starts or stops naming calls, in all threads."""
    _state["on"] = on


def span(kind: str, *words: str) -> record_function:
    """A context that a profile shows under `kind` and `words`."""
    return record_function(SEPARATOR.join((PREFIX, kind, *words)))


def within(call: Callable[..., Any], kind: str, *words: str) -> Callable[..., Any]:
    """`call`, run within such a context."""

    @functools.wraps(call)
    def named(*args: Any, **kwargs: Any) -> Any:
        with span(kind, *words):
            return call(*args, **kwargs)

    return named
