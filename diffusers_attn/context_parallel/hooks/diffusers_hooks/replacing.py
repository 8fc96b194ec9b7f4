"""Replacing methods of single hooks, and restoring them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....errors import AttentionProviderError
from .registry import class_name

_REPLACED = "_replaced_over_ranks"


def replace(hook: Any, holder: Any, name: str, function: Callable[..., Any]) -> None:
    """Replaces the attribute `name` of `holder` until `restore(hook)`.

    Raises:
        AttentionProviderError: there is no such attribute, because diffusers has changed.
    """
    if not hasattr(holder, name):
        raise AttentionProviderError(
            f"{class_name(hook)} of this version of diffusers has no {name}, which must be replaced where a model is "
            "split between ranks. Install the version of diffusers that this library was tested with."
        )
    replaced = vars(hook).setdefault(_REPLACED, [])
    replaced.append((holder, name, vars(holder).get(name)))
    setattr(holder, name, function)


def restore(hook: Any) -> None:
    """Restores everything that was replaced for a hook."""
    for holder, name, before in vars(hook).pop(_REPLACED, ()):
        if before is None:
            vars(holder).pop(name, None)
        else:
            setattr(holder, name, before)
