"""Finds what a user means by the name of a model class."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import AttentionProviderError


def classes_like(name: str, known: Sequence[str]) -> list[str]:
    """The class of this name; otherwise the classes whose names contain it, in any case.

    Raises:
        AttentionProviderError: there is none. The message names similar ones.
    """
    if name in known:
        return [name]
    lowered = name.lower().replace("-", "").replace("_", "")
    found = [each for each in known if lowered in each.lower()]
    if found:
        return found
    lower = {each.lower(): each for each in known}
    alike = [lower[each] for each in difflib.get_close_matches(lowered, list(lower), n=3)]
    hint = f"Did you mean {' or '.join(alike)}?" if alike else "`diffusers-attn models` lists all classes."
    raise AttentionProviderError(f"there is no model class {name!r} in the plans. {hint}")


def one_class(name: str, known: Sequence[str]) -> str:
    """As `classes_like`, where only one class is accepted.

    Raises:
        AttentionProviderError: there is none, or there are several.
    """
    found = classes_like(name, known)
    if len(found) > 1:
        raise AttentionProviderError(f"{name!r} stands for several model classes. Name one: {', '.join(found)}.")
    return found[0]
